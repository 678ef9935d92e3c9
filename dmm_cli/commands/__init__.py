"""The terminal layer: parse, call the library, report. One module per command."""
