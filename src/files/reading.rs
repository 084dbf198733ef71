//! Files read and converted ahead of what is stored, on the engine's threads: one task reads pieces, one converts them.
//!
//! Both are bounded: a few pieces wait between them and before the load, then they wait, too. They end when nobody
//! receives any more, wherever they wait.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use arrow::array::RecordBatch;
use rakam_event::batch::{EventStamp, InvalidCount, InvalidValue};
use rakam_event::schema::Schema;
use rakam_event::types::FieldType;
use rakam_files::FilesError;
use rakam_files::convert::Converter;
use rakam_files::locate::Found;
use rakam_files::object::{Stop, blocking};
use rakam_files::source::{self, Meter, Piece, Position, Spec};
use tokio::sync::{mpsc, oneshot};

use crate::pg::Result;
use crate::pg::runtime::{self, Port, Runtime, Sender};

/// Pieces that wait to be converted, and converted ones that wait for the load.
const PIECES: usize = 1;
const CONVERTED: usize = 2;

/// Ends the readers of its files when it is dropped.
#[derive(Default)]
pub struct Readers(Stop);

impl Readers {
    pub fn stop(&self) -> &Stop {
        &self.0
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Which files, from where on.
pub struct Files {
    pub files: Vec<Found>,
    pub spec: Spec,
    pub first: usize,
    /// In the first file.
    pub from: Position,
}

/// What becomes of their rows.
pub struct Conversion {
    pub converter: Converter,
    /// The bounds of events' times, counted from now.
    pub time_past_us: i64,
    pub time_future_us: i64,
}

/// What the load is told, in the order of the files.
pub enum Told {
    /// Fields that rows have and the schema has not: the reading goes on with the schema that is answered.
    NewFields(Vec<(String, FieldType)>, oneshot::Sender<Schema>),
    Rows(Box<Converted>),
    /// A file is through; the index of the next one.
    Next(usize),
    Failed(FilesError),
    /// All files are through.
    End,
}

/// A piece of a file as events of the schema.
pub struct Converted {
    pub schema: Arc<Schema>,
    pub batch: RecordBatch,
    pub samples: Vec<InvalidValue>,
    pub counts: Vec<InvalidCount>,
    /// Where in its file the next piece begins.
    pub after: Position,
    /// Bytes of all files that have been read.
    pub bytes: u64,
}

/// From the task that reads to the one that converts.
enum Read {
    Piece {
        file: usize,
        piece: Piece,
        declared: Arc<[(String, FieldType)]>,
        bytes: u64,
    },
    Next(usize),
    Failed(FilesError),
    End,
}

/// Starts to read. The files were found with the same `readers`.
pub fn start(files: Files, conversion: Conversion, readers: &Readers) -> Result<Port<Told>> {
    let stop = readers.stop().clone();
    let runtime = Runtime::current()?;
    let (told, port) = runtime::port(CONVERTED)?;
    let (pieces, read) = mpsc::channel(PIECES);
    let names = files.files.iter().map(|file| file.name.clone()).collect();
    runtime.spawn(async move {
        let end = match stop.or(read_all(files, &pieces)).await {
            Ok(()) => Read::End,
            Err(error) => Read::Failed(error),
        };
        // The other task is gone when the load is.
        let _unheard = pieces.send(end).await;
    });
    runtime.spawn(convert_all(conversion, names, read, told));
    Ok(port)
}

/// Reads the files to their end, or until nobody listens.
async fn read_all(
    files: Files,
    pieces: &mpsc::Sender<Read>,
) -> std::result::Result<(), FilesError> {
    let Files {
        files,
        spec,
        first,
        mut from,
    } = files;
    let mut before: u64 = files.iter().take(first).map(|file| file.bytes).sum();
    for (index, file) in files.iter().enumerate().skip(first) {
        let meter = Meter::default();
        let open = {
            let (file, spec, meter) = (file.clone(), spec.clone(), meter.clone());
            move || source::open(&file, &spec, from, &meter)
        };
        let mut source = blocking(open).await??;
        let declared: Arc<[_]> = source.declared().into();
        loop {
            let piece;
            (source, piece) = blocking(move || {
                let piece = source.next();
                (source, piece)
            })
            .await?;
            let Some(piece) = piece? else { break };
            let read = Read::Piece {
                file: index,
                piece,
                declared: Arc::clone(&declared),
                bytes: before + meter.bytes(),
            };
            if pieces.send(read).await.is_err() {
                return Ok(());
            }
        }
        before += file.bytes;
        from = Position::default();
        if pieces.send(Read::Next(index + 1)).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Converts pieces until there are no more, or nobody listens.
async fn convert_all(
    conversion: Conversion,
    names: Vec<String>,
    mut read: mpsc::Receiver<Read>,
    told: Sender<Told>,
) {
    let Conversion {
        mut converter,
        time_past_us,
        time_future_us,
    } = conversion;
    let mut schema = Arc::new(converter.schema().clone());
    while let Some(read) = read.recv().await {
        let message = match read {
            Read::Next(next) => Told::Next(next),
            Read::Failed(error) => Told::Failed(error),
            Read::End => Told::End,
            Read::Piece {
                file,
                piece,
                declared,
                bytes,
            } => {
                let fields = converter.new_fields(&piece.rows, &declared);
                if !fields.is_empty() {
                    let (answer, answered) = oneshot::channel();
                    if !told.send(Told::NewFields(fields, answer)).await {
                        return;
                    }
                    let Ok(new) = answered.await else {
                        return;
                    };
                    converter.set_schema(&new);
                    schema = Arc::new(new);
                }
                let now = now_us();
                let stamp = EventStamp {
                    received_at_us: now,
                    shift_us: 0,
                    time_min_us: now.saturating_sub(time_past_us),
                    time_max_us: now.saturating_add(time_future_us),
                    // Known when the events are stored; after whatever was dropped before.
                    xid: i64::MAX,
                };
                match converter.convert(piece.rows, &names[file], &stamp) {
                    Err(error) => Told::Failed(error),
                    Ok((batch, refused)) => {
                        for bad in piece.bad.iter().chain(&refused) {
                            converter.log_bad(bad, &names[file], now);
                        }
                        let (samples, counts) = converter.take_log();
                        Told::Rows(Box::new(Converted {
                            schema: Arc::clone(&schema),
                            batch,
                            samples,
                            counts,
                            after: piece.after,
                            bytes,
                        }))
                    }
                }
            }
        };
        let ends = matches!(message, Told::Failed(_) | Told::End);
        if !told.send(message).await || ends {
            return;
        }
    }
}

/// The clock in microseconds since 1970, without the server.
fn now_us() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as i64)
}
