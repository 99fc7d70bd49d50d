"""The trainer: data, models, methods and the loop that runs them."""
