"""Thin adapters from the core to Ray: a Ray Data plan, a Ray Train loop, a Serve application."""
