//! Files: each object under a prefix of a storage once.
//!
//! An object is a split that ends. It is found and read as `copy_from` finds and reads it ([`rakam_files::locate`],
//! [`rakam_files::source`]), piece by piece from where a stored position says. Objects are taken for immutable: one that is
//! another one than was begun stops. So does one that cannot be read; those that the storage does not give at present are tried
//! again, and hold up no others.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rakam_event::types::FieldType;
use rakam_files::FilesError;
use rakam_files::locate::{Found, Root};
use rakam_files::object;
use rakam_files::source::{self, Meter, Piece, Source, Spec};
use rakam_lake::owner::writer_of;

use crate::batch::{Batch, FilePiece, Limits, Stop};
use crate::cursor::Cursors;
use crate::error::{SourceError, StopReason};
use crate::position::{Position, version_hash};
use crate::source::{Ends, Fetch, Lag, Split, Splits, Start};

/// Most objects of a source: each is a row of the checkpoint table.
const MOST_OBJECTS: usize = 1_000_000;
/// An object that could not be read so often, while others could, is not to be read.
const MOST_FAILURES: u32 = 5;

/// Objects under a prefix.
#[derive(Clone)]
pub struct Objects {
    pub root: Root,
    /// Ends what is on its way: with the reader that has them.
    pub stop: object::Stop,
    /// An object, a pattern, or a path of whole components, as for `attach_files`; empty: all of the storage.
    pub prefix: String,
    pub spec: Spec,
}

impl Objects {
    /// Those whose data they are: see [`rakam_files::locate::below`].
    async fn found(&self) -> Result<Vec<Found>, SourceError> {
        let found = (self.root)
            .data(&self.prefix, self.spec.format, MOST_OBJECTS, &self.stop)
            .await;
        match found {
            // The first object is still to come, unless the storage itself is missing.
            Err(FilesError::NoFile(_)) => {
                let there = self.root.check(&self.stop).await;
                there.map(|()| Vec::new()).map_err(unlisted)
            }
            found => found.map_err(unlisted),
        }
    }

    /// Opens an object at a position.
    async fn begin(&self, split: &str, from: &Position) -> Result<Reading, Fault> {
        // While the storage itself is missing nothing is known of its objects.
        let found = self.root.get(split, &self.stop).await;
        let Some(found) = found.map_err(Fault::for_now)? else {
            return Err(Fault::Stop(StopReason::Gone));
        };
        let version = version_hash(&found.version());
        let from = match *from {
            Position::Row {
                row,
                byte,
                line,
                version: then,
            } => {
                if then != version {
                    return Err(Fault::Stop(StopReason::Changed));
                }
                source::Position { row, byte, line }
            }
            _ => source::Position::default(),
        };
        let spec = self.spec.clone();
        let meter = Meter::of(&self.stop);
        let open = move || source::open(&found, &spec, from, &meter);
        let source = object::blocking(open).await??;
        Ok(Reading {
            split: split.to_owned(),
            declared: source.declared().into(),
            source,
            version,
        })
    }
}

/// Why objects could not be listed.
fn unlisted(error: FilesError) -> SourceError {
    match &error {
        FilesError::Path { .. } | FilesError::Option { .. } => {
            SourceError::option(error.to_string(), error.hint().unwrap_or_default())
        }
        _ => SourceError::Unreachable {
            action: "list the objects of a storage",
            reason: error.to_string(),
        },
    }
}

#[async_trait]
impl Splits for Objects {
    async fn list(&mut self) -> Result<Vec<Split>, SourceError> {
        let found = self.found().await?;
        let split = |object: Found| Split {
            id: object.name,
            parents: Vec::new(),
            closed: true,
        };
        // Data files of projects lie in storages, too: those of others are not for this one, and its own would be read
        // again and again, as each flush makes new ones.
        let foreign = |object: &Found| writer_of(&object.name).is_none();
        Ok(found.into_iter().filter(foreign).map(split).collect())
    }

    async fn locate(
        &mut self,
        splits: &[Split],
        start: &Start,
    ) -> Result<Vec<Position>, SourceError> {
        match start {
            Start::Earliest => Ok(vec![Position::Beginning; splits.len()]),
            _ => Err(SourceError::option(
                "files are read from their beginning",
                "Leave the option \"start\" out, or choose a narrower prefix.",
            )),
        }
    }
}

/// Reads objects, one after another.
pub struct FileFetch {
    objects: Objects,
    /// How long an object is left alone after a first failure: twice as long after each further one.
    pause: Duration,
    cursors: Cursors<Known>,
    reading: Option<Reading>,
    /// A poll began whose batch nobody has got.
    undelivered: bool,
}

impl Drop for FileFetch {
    fn drop(&mut self) {
        self.objects.stop.stop();
    }
}

/// What is known of an object beside its positions.
struct Known {
    /// In succession.
    failures: u32,
    /// Others could be read since the first of them.
    others_went_on: bool,
    due: Instant,
}

/// The object being read.
struct Reading {
    split: String,
    source: Box<dyn Source>,
    declared: Declared,
    version: u64,
}

/// Columns whose type the object itself says.
type Declared = Arc<[(String, FieldType)]>;

/// A piece of an object and the position behind it; None: the object's end.
type Told = Option<(Piece, Declared, Position)>;

/// Why an object gives no piece.
enum Fault {
    Stop(StopReason),
    Trouble(SourceError),
}

impl Fault {
    fn for_now(error: FilesError) -> Self {
        Self::Trouble(SourceError::Unreachable {
            action: "read an object",
            reason: error.to_string(),
        })
    }
}

impl From<FilesError> for Fault {
    fn from(error: FilesError) -> Self {
        let at_present = match &error {
            FilesError::Io { kind, .. } => match kind {
                std::io::ErrorKind::NotFound => return Self::Stop(StopReason::Gone),
                std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::IsADirectory => false,
                _ => true,
            },
            // What was changed while it was read is told from what was begun by the next attempt.
            FilesError::Store { sqlstate, .. } => match *sqlstate {
                "58P01" => return Self::Stop(StopReason::Gone),
                sqlstate => matches!(sqlstate, "58030" | "53100"),
            },
            FilesError::Cancelled => true,
            _ => false,
        };
        match at_present {
            true => Self::for_now(error),
            false => Self::Stop(error.into()),
        }
    }
}

impl FileFetch {
    pub fn new(objects: Objects) -> Self {
        Self::with_pause(objects, Duration::from_secs(1))
    }

    fn with_pause(objects: Objects, pause: Duration) -> Self {
        Self {
            objects,
            pause,
            cursors: Cursors::default(),
            reading: None,
            undelivered: false,
        }
    }

    /// The next piece of an object, of so many rows at most. What a dropped call had read is read again.
    async fn piece(&mut self, split: &str, from: &Position, rows: usize) -> Result<Told, Fault> {
        let reading = match self.reading.take().filter(|r| r.split == split) {
            Some(reading) => reading,
            None => self.objects.begin(split, from).await?,
        };
        let next = move || {
            let mut reading = reading;
            reading.source.bound(rows);
            let piece = reading.source.next();
            (reading, piece)
        };
        let (reading, piece) = object::blocking(next).await?;
        let Some(piece) = piece? else {
            return Ok(None);
        };
        let to = Position::Row {
            row: piece.after.row,
            byte: piece.after.byte,
            line: piece.after.line,
            version: reading.version,
        };
        let declared = Arc::clone(&reading.declared);
        self.reading = Some(reading);
        Ok(Some((piece, declared, to)))
    }

    /// The first object that is due.
    fn next(&self) -> Option<(String, Position)> {
        let now = Instant::now();
        let mut open = self.cursors.iter();
        open.find(|c| !c.done && !c.paused && c.more.due <= now)
            .map(|c| (c.split.clone(), c.read.clone()))
    }

    /// An object was read: those that were not are at fault themselves.
    fn others_went_on(&mut self) {
        for cursor in self.cursors.iter_mut() {
            cursor.more.others_went_on = true;
        }
    }

    /// Takes in what an object gave.
    fn hear(
        &mut self,
        (split, from): (String, Position),
        told: Result<Told, Fault>,
        batch: &mut Batch,
    ) {
        let pause = self.pause;
        if told.is_ok() {
            self.others_went_on();
        }
        let Some(cursor) = self.cursors.get(&split) else {
            return;
        };
        let known = &mut cursor.more;
        let reason = match told {
            Ok(piece) => {
                known.failures = 0;
                let moved = batch.moved(&split, &from);
                match piece {
                    Some((piece, declared, to)) => {
                        batch.moves[moved].records += piece.rows.len() as u64;
                        batch.moves[moved].to = to.clone();
                        batch.pieces.push(FilePiece {
                            split: moved,
                            piece,
                            declared,
                        });
                        cursor.read = to;
                    }
                    None => {
                        batch.moves[moved].ended = true;
                        cursor.done = true;
                    }
                }
                return;
            }
            Err(Fault::Stop(reason)) => reason,
            Err(Fault::Trouble(error)) => {
                if known.failures == 0 {
                    known.others_went_on = false;
                }
                known.failures += 1;
                if known.failures < MOST_FAILURES || !known.others_went_on {
                    let factor = 1 << (known.failures - 1).min(6);
                    known.due = Instant::now() + pause.saturating_mul(factor);
                    batch.trouble = Some(error);
                    return;
                }
                StopReason::Unreadable(error.to_string())
            }
        };
        cursor.done = true;
        batch.stops.push(Stop { split, reason });
    }
}

#[async_trait]
impl Fetch for FileFetch {
    async fn open(&mut self, split: &str, from: Position) -> Result<(), SourceError> {
        if !matches!(from, Position::Beginning | Position::Row { .. }) {
            return Err(SourceError::Misuse(format!(
                "an object has no position {from:?}"
            )));
        }
        self.close(split).await?;
        let known = Known {
            failures: 0,
            others_went_on: false,
            due: Instant::now(),
        };
        self.cursors.open(split, from, known);
        Ok(())
    }

    async fn close(&mut self, split: &str) -> Result<(), SourceError> {
        self.cursors.close(split);
        self.reading.take_if(|reading| reading.split == split);
        Ok(())
    }

    async fn poll(&mut self, limits: &Limits) -> Result<Batch, SourceError> {
        if self.undelivered {
            self.rewind().await?;
        }
        self.undelivered = true;
        let mut batch = Batch::default();
        let until = Instant::now() + limits.wait;
        while let Some((split, from)) = self.next() {
            let told = self.piece(&split, &from, limits.records).await;
            self.hear((split, from), told, &mut batch);
            if !batch.stops.is_empty() || is_enough(&batch, limits) || Instant::now() >= until {
                break;
            }
        }
        if batch.is_empty() {
            tokio::time::sleep_until(until.into()).await;
        }
        self.undelivered = false;
        Ok(batch)
    }

    fn ack(&mut self, batch: &Batch) {
        self.cursors.ack(batch);
    }

    async fn rewind(&mut self) -> Result<(), SourceError> {
        self.cursors.rewind();
        self.reading = None;
        self.undelivered = false;
        Ok(())
    }

    async fn pause(&mut self, split: &str, paused: bool) -> Result<(), SourceError> {
        if let Some(cursor) = self.cursors.get(split) {
            cursor.paused = paused;
        }
        Ok(())
    }

    fn lag(&mut self, _split: &str, _ends: &Ends) -> Option<Lag> {
        // How many rows a file has, only reading tells.
        None
    }
}

/// Whether pieces are as many rows or bytes as a batch is to have.
fn is_enough(batch: &Batch, limits: &Limits) -> bool {
    let rows: u64 = batch.moves.iter().map(|moved| moved.records).sum();
    let bytes: u64 = batch.pieces.iter().map(|file| file.piece.bytes).sum();
    rows >= limits.records as u64 || bytes >= limits.bytes as u64
}

#[cfg(test)]
mod tests;
