"""The options of each command as the fields of a frozen dataclass, and what the parser makes of them."""
