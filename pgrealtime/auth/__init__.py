"""Who is asking: principals, the tokens that prove them, the rows behind them."""
