"""The recipes that come with Reverie, one TOML file each."""
