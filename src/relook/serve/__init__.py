"""Serving: an HTTP server in the shape of OpenAI's API over one engine."""
