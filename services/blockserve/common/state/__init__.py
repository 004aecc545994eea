"""The state that processes of a cluster share: one contract, kept in memory or in Redis or Valkey."""
