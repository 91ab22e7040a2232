"""The mixture, a Pyro distribution, and its closed-form algebra."""
