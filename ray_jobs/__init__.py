"""Entry points for `ray job submit`. Each module runs one command with the settings of one YAML file."""
