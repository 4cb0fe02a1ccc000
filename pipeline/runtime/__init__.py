"""The parts that every command needs: errors, storage, artifacts, leases, configs, registries, signals, progress."""
