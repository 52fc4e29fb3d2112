"""Time series: data and synthesis, forecasting, tuning, backtests."""
