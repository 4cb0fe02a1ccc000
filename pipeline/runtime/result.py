"""What a command returns."""

Result = dict[str, object]
"""The JSON object that --json prints. Its entry "summary" is what the command prints without --json."""
