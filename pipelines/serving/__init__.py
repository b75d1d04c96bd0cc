"""The HTTP server: routes, request formats, batching and limits. It runs without Ray."""
