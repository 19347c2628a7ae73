//! The migration stream: bytes, sections, RAM records.
