"""What runs inside a pipeline step: plain typed functions, and the thin KFP shells that call them."""
