//! Event stores: what projects collect goes out to Kafka or Kinesis, once per event for whoever looks at the marks of records.
//!
//! Collect leaves its events in the outbox (`catalog::outbox`), in the caller's transaction. [`relay`], in a worker, gives the
//! store's next batch its number in a short transaction, publishes it outside of any, and notes in another that it is published. What
//! a crash leaves between is published again under the same number, and our own sources tell the copies
//! (`rakam_sources::published`). [`parcel`] makes records of rows, [`rotate`] gives space back, [`functions`] is how users set stores.

mod functions;
mod lane;
mod parcel;
pub mod relay;
mod rotate;
