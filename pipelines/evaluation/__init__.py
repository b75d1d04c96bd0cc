"""How good a model folder is on labelled data: scoring it, tuning it, and the report page."""
