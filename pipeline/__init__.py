"""The library behind the stages. It parses no flags, prints no results and imports no stage."""
