"""The service: an HTTP API over the store, a page to look at, and a supervisor that starts drivers."""
