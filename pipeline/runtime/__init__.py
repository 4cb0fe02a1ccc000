"""What any command is made of: errors, storage, artifacts, leases, configs, registries, signals, progress."""
