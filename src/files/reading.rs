//! Files read and converted ahead of what is stored, on the engine's threads: one task reads pieces, one converts them and
//! parts their events by month, while the load stores what came before.
//!
//! Both are bounded: what has been converted and is not stored yet has a place in memory ([`Conversion::room`]), and
//! without one they wait. What is just read has its part of the memory of engines, as it has where a query reads it. They end
//! when nobody receives any more, wherever they wait.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arrow::array::{Array, ArrayRef, BooleanArray, RecordBatch};
use arrow::compute::{filter_record_batch, is_not_null, is_null};
use arrow::error::ArrowError;
use rakam_engine::{BudgetPool, RequestMemory, Reserved};
use rakam_event::batch::{EventStamp, InvalidCount, InvalidValue};
use rakam_event::schema::{ID, Schema};
use rakam_event::types::FieldType;
use rakam_files::FilesError;
use rakam_files::convert::Converter;
use rakam_files::locate::Found;
use rakam_files::object::{Stop, blocking};
use rakam_files::source::{self, Meter, Piece, Position, Spec};
use rakam_lake::error::LakeError;
use rakam_lake::{backlog, chunk};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::block_in_place;
use tokio::time::sleep;

use crate::pg::runtime::{self, Port, Runtime, Sender};
use crate::pg::{Result, guc, memory};

/// Pieces that wait to be converted, and converted ones that wait for the load (of which their memory is the bound).
const PIECES: usize = 1;
const CONVERTED: usize = 256;
/// Memory is counted in units of so many bytes.
const ROOM_UNIT: usize = 4096;
/// How long memory that queries have is waited for, and how soon it is asked for again.
const MEMORY_PATIENCE: Duration = Duration::from_secs(30);
const MEMORY_PAUSE: Duration = Duration::from_millis(50);

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
    /// All rows go through the inbox.
    pub is_mapped: bool,
    /// Bytes that the load gathers before it stores them; as many may wait meanwhile.
    pub room: usize,
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
    pub rows: Parted,
    /// About the memory of the rows.
    pub memory: usize,
    pub samples: Vec<InvalidValue>,
    pub counts: Vec<InvalidCount>,
    /// Where in its file the next piece begins.
    pub after: Position,
    /// Bytes of all files that have been read.
    pub bytes: u64,
    /// Its place in memory, until it is dropped.
    _room: OwnedSemaphorePermit,
}

/// The events of a piece.
pub struct Parted {
    /// Those that go through the inbox, as the file has them.
    pub in_order: Option<RecordBatch>,
    /// Those that become chunks, by the first day of their month; without columns that the piece has no values of.
    pub months: Vec<(i32, RecordBatch)>,
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
    let shared = Shared {
        pool: memory::pool(),
        limit: guc::memory_limit_bytes(),
    };
    let names = files.files.iter().map(|file| file.name.clone()).collect();
    runtime.spawn(async move {
        let end = match stop.or(read_all(files, &pieces, &stop, &shared)).await {
            Ok(()) => Read::End,
            Err(error) => Read::Failed(error),
        };
        // The other task is gone when the load is.
        let _unheard = pieces.send(end).await;
    });
    runtime.spawn(convert_all(conversion, names, read, told));
    Ok(port)
}

/// The memory that all engines of the server have together.
struct Shared {
    pool: Arc<BudgetPool>,
    /// There is no more of it.
    limit: usize,
}

impl Shared {
    /// So much of it, for the reading of a file.
    async fn take(&self, bytes: u64, file: &str) -> std::result::Result<Reserved, FilesError> {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let end = Instant::now() + MEMORY_PATIENCE;
        let mut memory = self.pool.reserve("files of a load");
        while memory.resize(bytes).is_err() {
            if bytes > self.limit || Instant::now() >= end {
                return Err(FilesError::OutOfMemory(file.to_owned()));
            }
            sleep(MEMORY_PAUSE).await;
        }
        Ok(memory)
    }
}

/// Reads the files to their end, or until nobody listens or it is told to stop.
async fn read_all(
    files: Files,
    pieces: &mpsc::Sender<Read>,
    stop: &Stop,
    shared: &Shared,
) -> std::result::Result<(), FilesError> {
    let Files {
        files,
        spec,
        first,
        mut from,
    } = files;
    let mut before: u64 = files.iter().take(first).map(|file| file.bytes).sum();
    for (index, file) in files.iter().enumerate().skip(first) {
        let meter = Meter::of(stop).with_memory(Arc::new(RequestMemory::new(&shared.pool)));
        let open = {
            let (file, spec, meter) = (file.clone(), spec.clone(), meter.clone());
            move || source::open(&file, &spec, from, &meter)
        };
        let mut source = blocking(open).await??;
        let declared: Arc<[_]> = source.declared().into();
        loop {
            // Before it is read: whoever may not hold it does not make it either.
            let bytes = source.next_bytes();
            let memory = shared.take(bytes, &file.name).await?;
            let piece;
            (source, piece) = blocking(move || {
                let piece = source.next();
                (source, piece)
            })
            .await?;
            drop(memory);
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

/// Does long work without holding up the other tasks: the runtime has those that wait for this thread done by another.
fn aside<T>(work: impl FnOnce() -> T) -> T {
    block_in_place(work)
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
        is_mapped,
        room,
    } = conversion;
    let most = u32::try_from(room / ROOM_UNIT).unwrap_or(u32::MAX).max(1);
    let free = Arc::new(Semaphore::new(2 * most as usize));
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
                let fields = aside(|| converter.new_fields(&piece.rows, &declared));
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
                let converted = aside(|| {
                    let (batch, refused) = converter.convert(piece.rows, &names[file], &stamp)?;
                    Ok((part(&batch, is_mapped)?, refused))
                });
                match converted {
                    Err(error) => Told::Failed(error),
                    Ok((rows, refused)) => {
                        for bad in piece.bad.iter().chain(&refused) {
                            converter.log_bad(bad, &names[file], now);
                        }
                        let (samples, counts) = converter.take_log();
                        let units = u32::try_from(rows.memory().div_ceil(ROOM_UNIT));
                        let units = units.unwrap_or(most).min(most);
                        // It is never closed.
                        let Ok(room) = Arc::clone(&free).acquire_many_owned(units).await else {
                            return;
                        };
                        Told::Rows(Box::new(Converted {
                            schema: Arc::clone(&schema),
                            rows,
                            memory: units as usize * ROOM_UNIT,
                            samples,
                            counts,
                            after: piece.after,
                            bytes,
                            _room: room,
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

impl Parted {
    fn memory(&self) -> usize {
        let months = self.months.iter().map(|(_, rows)| rows);
        months.chain(&self.in_order).map(value_bytes).sum()
    }
}

/// Parts the rows of a piece.
fn part(batch: &RecordBatch, is_mapped: bool) -> std::result::Result<Parted, FilesError> {
    let (plain, in_order) =
        roads(batch, is_mapped).map_err(|e| FilesError::Arrow(e.to_string()))?;
    let months = match plain {
        Some(rows) => by_month(&rows).map_err(|e| FilesError::Arrow(e.to_string()))?,
        None => Vec::new(),
    };
    Ok(Parted { in_order, months })
}

/// Rows that become chunks, by the first day of their month.
pub fn by_month(rows: &RecordBatch) -> std::result::Result<Vec<(i32, RecordBatch)>, LakeError> {
    let mut months = Vec::new();
    for lean in chunk::without_empty_columns(std::slice::from_ref(rows))? {
        months.extend(backlog::by_month(&lean)?);
    }
    Ok(months)
}

/// The rows that become chunks, and those that go through the inbox: those with an `_id`, whose copies are to be found, and
/// all where a mapper wants them.
pub fn roads(
    batch: &RecordBatch,
    is_mapped: bool,
) -> std::result::Result<(Option<RecordBatch>, Option<RecordBatch>), ArrowError> {
    let some = |rows: RecordBatch| (rows.num_rows() > 0).then_some(rows);
    if is_mapped {
        return Ok((None, some(batch.clone())));
    }
    match batch.column_by_name(ID).filter(|ids| has_values(ids)) {
        None => Ok((some(batch.clone()), None)),
        Some(ids) => {
            let part = |mask: &BooleanArray| filter_record_batch(batch, mask).map(some);
            Ok((part(&is_null(ids)?)?, part(&is_not_null(ids)?)?))
        }
    }
}

/// About the memory of the columns that have values.
pub fn value_bytes(batch: &RecordBatch) -> usize {
    (batch.columns().iter())
        .filter(|column| has_values(column))
        .map(|column| column.get_array_memory_size())
        .sum()
}

fn has_values(column: &ArrayRef) -> bool {
    column.null_count() < column.len()
}

/// The clock in microseconds since 1970, without the server.
fn now_us() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as i64)
}
