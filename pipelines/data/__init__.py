"""Pictures on disk: where they come from, the shards and tables that hold them, and what must be true of them."""
