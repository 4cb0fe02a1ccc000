"""Processes that train together: `collectives` for what ranks exchange, `launch.launch_ranks` to start them."""
