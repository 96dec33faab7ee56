"""The HTTP front end. No torch, ever."""
