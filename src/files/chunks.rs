//! Events of a load as chunks of one month each: sorted, split and encoded on the engine's threads while the load stores
//! those that are there.

use std::sync::Arc;

use arrow::array::{Int64Array, RecordBatch};
use rakam_event::schema::XID;
use rakam_lake::backlog::Months;

use crate::ingest::append::{self, Encoded, Target};
use crate::pg::runtime::{self, Runtime, Sender};
use crate::pg::{PgError, Result, wait};

/// Rows of a chunk.
const CHUNK_ROWS: usize = 65_536;
/// Chunks that wait to be stored.
const CHUNKS: usize = 4;

enum Told {
    Chunk(Encoded),
    Failed(PgError),
    End,
}

/// Stores the events of batches that share a schema, with the id of this transaction.
pub fn store(target: Target, batches: Vec<RecordBatch>, xid: i64) -> Result<()> {
    if batches.is_empty() {
        return Ok(());
    }
    let (told, mut port) = runtime::port(CHUNKS)?;
    Runtime::current()?.spawn(async move {
        let end = match encode_all(&batches, target.schema_version, xid, &told).await {
            Ok(()) => Told::End,
            Err(error) => Told::Failed(error),
        };
        told.send(end).await
    });
    loop {
        wait::check_interrupts();
        match port.receive() {
            Some(Told::Chunk(chunk)) => append::append_encoded(target, &chunk)?,
            Some(Told::Failed(error)) => return Err(error),
            Some(Told::End) => return Ok(()),
            None => return Err(PgError::internal("the encoding of chunks ended early")),
        }
    }
}

async fn encode_all(
    batches: &[RecordBatch],
    schema_version: i32,
    xid: i64,
    told: &Sender<Told>,
) -> Result<()> {
    for part in Months::new(batches, CHUNK_ROWS)? {
        let chunk = Encoded::new(&stamped(&part?, xid)?, schema_version)?;
        if !told.send(Told::Chunk(chunk)).await {
            break;
        }
    }
    Ok(())
}

/// The events with the id of the transaction that stores them.
fn stamped(batch: &RecordBatch, xid: i64) -> Result<RecordBatch> {
    let failed = |e| PgError::internal(format!("could not store the rows of a file: {e}"));
    let mut columns = batch.columns().to_vec();
    let position = batch.schema().index_of(XID).map_err(failed)?;
    columns[position] = Arc::new(Int64Array::from_value(xid, batch.num_rows()));
    RecordBatch::try_new(batch.schema(), columns).map_err(failed)
}
