//! Records of a source become events, in the transaction in which the consumer moves the source's positions.
//!
//! The consumer's turn with a batch that it polled outside of any transaction:
//!
//! 1. [`Stream::prepare`], outside of a transaction: decodes the records; collections and fields that they need are registered
//!    in short transactions of their own.
//! 2. In one transaction: [`Stream::store`], then `catalog::sources::advance`, which compares and sets the epoch and the position of
//!    each split that the batch moves. If somebody else has a split by now, everything is rolled back.
//! 3. If the transaction failed for another reason the consumer prepares the batch anew: `store` may leave what it likes in
//!    `Prepared`.
//!
//! A consumer has one `Stream` for each source that it reads; it is made anew when the source's definition changes.

use std::sync::Arc;

use rakam_sources::batch::Batch;
use rakam_sources::decode::{Decoded, Decoder};

use super::collect::limits;
use super::mapper::{self, Shape};
use crate::catalog::dead_letter::{self, NewRecord};
use crate::catalog::inbox::Entry;
use crate::catalog::projects;
use crate::catalog::sources::Source;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result};

/// How the records of one source become events.
pub struct Stream {
    project_id: i32,
    source: String,
    decoder: Decoder,
}

/// A batch that is ready to be stored.
pub struct Prepared {
    batch: Arc<Batch>,
    decoded: Decoded,
}

impl Prepared {
    pub fn batch(&self) -> &Batch {
        &self.batch
    }
}

/// What became of a batch.
#[derive(Debug, Default)]
pub struct Stored {
    pub events: u64,
    pub dead: u64,
    /// For each of the batch's moves, whether an event of it came without an `_id`: read again, it would count twice.
    pub lacks_id: Vec<bool>,
}

impl Stream {
    /// Outside of a transaction or in one.
    pub fn new(source: &Source) -> Self {
        Self {
            project_id: source.project_id,
            source: source.name.clone(),
            decoder: Decoder::new(
                source.options.format,
                source.options.route.clone(),
                limits(),
            ),
        }
    }

    /// Outside of any transaction.
    pub fn prepare(&mut self, batch: Arc<Batch>) -> std::result::Result<Prepared, Failure> {
        let decoded = self.decoder.decode(&batch);
        Ok(Prepared { batch, decoded })
    }

    /// In the transaction that moves the positions.
    pub fn store(&mut self, prepared: &mut Prepared) -> Result<Stored> {
        let Prepared { batch, decoded } = prepared;
        if !batch.pieces.is_empty() || !decoded.framed.is_empty() {
            return Err(PgError::new(
                "0A000",
                "files and framed Avro are not stored yet",
            ));
        }
        let now = xact::now_us();
        for (at, name) in decoded.collections.iter().enumerate() {
            let lines: Vec<&str> = decoded
                .events
                .iter()
                .filter(|event| event.collection == at)
                .map(|event| decoded.text(event))
                .collect();
            if lines.is_empty() {
                continue;
            }
            let text = lines.join("\n");
            let entry = Entry {
                project_id: self.project_id,
                collection_id: projects::collection_id(self.project_id, name.as_str())?,
                collection: name.as_str(),
                n: lines.len() as i32,
                received_at_us: now,
                shift_us: 0,
                payload: text.as_bytes().into(),
            };
            mapper::enter(&entry, Shape::Event)?;
        }
        for dead in &decoded.dead {
            let record = &batch.records()[dead.record];
            dead_letter::insert_record(&NewRecord {
                project_id: self.project_id,
                source: &self.source,
                split: &batch.moves[record.split].split,
                offset: &record.offset.to_string(),
                payload: batch.value(record).unwrap_or_default(),
                error: &format!("{} (SQLSTATE {})", dead.error, dead.error.sqlstate()),
                received_at_us: now,
            })?;
        }
        Ok(Stored {
            events: decoded.events.len() as u64,
            dead: decoded.dead.len() as u64,
            lacks_id: vec![true; batch.moves.len()],
        })
    }
}
