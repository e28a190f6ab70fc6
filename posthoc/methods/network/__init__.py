"""Modules that put noise into the network itself."""
