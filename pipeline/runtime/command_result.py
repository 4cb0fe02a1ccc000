"""What a command returns."""

CommandResult = dict[str, object]
"""The JSON object that --json prints. Its entry "summary" is the text that a command prints without --json."""
