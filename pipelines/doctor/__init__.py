"""What `modelmill doctor` looks at: everything that can spoil a run and can be seen before it starts."""
