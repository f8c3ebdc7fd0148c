"""The samloop MONAI Label application: wiring, server, command line."""
