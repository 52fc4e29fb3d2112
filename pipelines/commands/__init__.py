"""The subcommands of `modelmill`, one file a concern. Heavy imports stand inside the functions."""
