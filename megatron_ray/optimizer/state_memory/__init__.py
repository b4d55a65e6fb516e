"""Where main parameters and optimizer state are kept, and how an update gets at them."""
