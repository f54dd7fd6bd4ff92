"""The host's package of modules, as far as the extension and its reference script touch it."""
