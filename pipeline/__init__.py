"""The library: nouns. Never parses flags, never prints, never knows a stage."""
