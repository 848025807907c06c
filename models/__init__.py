"""Model families on paged KV memory, and the embedded checkpoint."""
