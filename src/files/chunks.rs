//! Events of a load as chunks of one month each: put in order and encoded on the engine's threads while the load stores
//! those that are there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow::array::RecordBatch;
use rakam_event::schema::Schema;
use rakam_lake::backlog::Months;
use rakam_lake::chunk;

use super::reading::value_bytes;
use crate::ingest::append::{self, CHUNK_BYTES, CHUNK_ROWS, Encoded, Target};
use crate::pg::runtime::{self, Runtime, Sender};
use crate::pg::{PgError, Result, wait};

/// Chunks that wait to be stored.
const CHUNKS: usize = 4;

enum Told {
    Chunk(Encoded),
    Failed(PgError),
    /// One of the tasks is through.
    End,
}

/// What the tasks encode, each month by one of them.
struct Work {
    schema: Arc<Schema>,
    months: Vec<Vec<RecordBatch>>,
    next: AtomicUsize,
    xid: i64,
}

/// Stores the events of batches of a schema, which [`rakam_lake::backlog::by_month`] has parted, with the id of this
/// transaction.
pub fn store(
    target: Target,
    schema: &Arc<Schema>,
    months: BTreeMap<i32, Vec<RecordBatch>>,
    xid: i64,
) -> Result<()> {
    if months.is_empty() {
        return Ok(());
    }
    let runtime = Runtime::current()?;
    // The other threads go on with reading.
    let mut tasks = (runtime.threads() / 2).clamp(1, months.len());
    let work = Arc::new(Work {
        schema: Arc::clone(schema),
        months: months.into_values().collect(),
        next: AtomicUsize::new(0),
        xid,
    });
    let (told, mut port) = runtime::port(CHUNKS)?;
    for _ in 0..tasks {
        let (work, told) = (Arc::clone(&work), told.clone());
        runtime.spawn(async move {
            let end = match work.encode(&told).await {
                Ok(()) => Told::End,
                Err(error) => Told::Failed(error),
            };
            told.send(end).await
        });
    }
    drop(told);
    while tasks > 0 {
        wait::check_interrupts();
        match port.receive() {
            Some(Told::Chunk(chunk)) => append::append_encoded(target, chunk)?,
            Some(Told::Failed(error)) => return Err(error),
            Some(Told::End) => tasks -= 1,
            None => return Err(PgError::internal("the encoding of chunks ended early")),
        }
    }
    Ok(())
}

impl Work {
    /// Encodes months until none is left, or nobody listens.
    async fn encode(&self, told: &Sender<Told>) -> Result<()> {
        while let Some(month) = self.months.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            let batches = chunk::of_same_columns(month.clone(), &self.schema)?;
            let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
            let bytes: usize = batches.iter().map(value_bytes).sum();
            let chunks = rows.div_ceil(CHUNK_ROWS).max(bytes.div_ceil(CHUNK_BYTES));
            // None is much smaller than the others, which a merge would take up again.
            let chunk_rows = rows.div_ceil(chunks.max(1));
            for part in Months::new(&batches, chunk_rows)? {
                for part in append::of_chunk_size(part?) {
                    let part = append::stamped(&part, self.xid)?;
                    if let Some(chunk) = Encoded::new(&part, self.schema.version)?
                        && !told.send(Told::Chunk(chunk)).await
                    {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }
}
