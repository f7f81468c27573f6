"""DeepSpeed as a `ShardedBackend`. Everything that depends on its internals is in this folder."""
