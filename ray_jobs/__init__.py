"""Entry points for `ray job submit`; each is its command with settings from one YAML file."""
