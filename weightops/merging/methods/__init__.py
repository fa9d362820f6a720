"""One function per merge method; the folder is the registry."""
