"""Bottom layer: configuration, storage, sessions, the command line. Imports none of ours."""
