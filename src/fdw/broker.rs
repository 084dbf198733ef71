//! How the engine's threads get at what only the backend's own thread may read.
//!
//! Every question is a message through the scan's port with a place for the answer. The backend's thread answers
//! while it waits for rows, under the scan's snapshot and user. An error of its own ends the query right there, so
//! an answer that never comes means that the scan is over.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::RecordBatch;
use async_trait::async_trait;
use bytes::Bytes;
use rakam_engine::{Broker, EngineError, rows};
use rakam_event::batch::{BatchBuilder, EventStamp, Layout};
use rakam_event::entry::Limits;
use rakam_event::error::EventError;
use rakam_event::schema::Schema;
use rakam_lake::LakeError;
use rakam_lake::id_run::IdEntry;
use rakam_lake::parts::PartSource;
use tokio::sync::{Mutex, OwnedSemaphorePermit, oneshot};

use super::identity::PARKED;
use super::unique::{self, Unique};
use crate::catalog::inbox::TailRow;
use crate::pg::runtime::Sender;

/// What the engine's threads send.
pub enum Message {
    /// Rows of the result. The permit bounds how many batches wait.
    Batch(RecordBatch, OwnedSemaphorePermit),
    Chunk {
        id: i64,
        reply: oneshot::Sender<Bytes>,
    },
    /// The next page of a collection's un-digested inbox rows.
    Page {
        part: usize,
        reply: oneshot::Sender<Option<Vec<TailRow>>>,
    },
    /// Which of these ids are known: their events are digested.
    Known {
        ids: Vec<IdEntry>,
        window_us: i64,
        reply: oneshot::Sender<Vec<bool>>,
    },
    /// A range of an object in the default storage.
    Object {
        path: String,
        range: Range<u64>,
        reply: oneshot::Sender<Bytes>,
    },
    Done(Result<(), EngineError>),
}

/// Asks the backend's thread; None when it does not listen any more.
async fn ask<T>(
    sender: &Sender<Message>,
    question: impl FnOnce(oneshot::Sender<T>) -> Message,
) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    if !sender.send(question(reply)).await {
        return None;
    }
    answer.await.ok()
}

fn gone() -> EngineError {
    EngineError::Internal("the scan was ended".to_owned())
}

/// How un-digested events of a collection become columns: as the digest will make them.
pub struct TailFormat {
    pub schema: Schema,
    pub limits: Limits,
    /// Bounds of `_time` relative to the time of receipt.
    pub time_past_us: i64,
    pub time_future_us: i64,
}

/// Answers for one collection of the scan.
pub struct CollectionBroker {
    sender: Sender<Message>,
    part: usize,
    format: TailFormat,
    /// The fields that the scan needs of the tail.
    projection: Vec<i32>,
    /// For a scan that tells its rows' identities: the places of the events, which are parked ones.
    places: Option<Arc<HashMap<i64, u32>>>,
    tail: Mutex<TailState>,
}

/// How far the tail has been read.
struct TailState {
    /// Batches of the last page that are still to be handed out.
    ready: VecDeque<TailBatch>,
    /// None: de-duplication is switched off.
    unique: Option<Unique>,
}

/// Events of the tail, with the time at which each was received.
struct TailBatch {
    batch: RecordBatch,
    received_us: Vec<i64>,
}

impl CollectionBroker {
    pub fn new(
        sender: Sender<Message>,
        part: usize,
        format: TailFormat,
        mut projection: Vec<i32>,
        unique: Option<Unique>,
        places: Option<Arc<HashMap<i64, u32>>>,
    ) -> Self {
        if unique.is_some()
            && let Some(id) = unique::id_field()
            && !projection.contains(&id)
        {
            projection.push(id);
        }
        Self {
            sender,
            part,
            format,
            projection,
            places,
            tail: Mutex::new(TailState {
                ready: VecDeque::new(),
                unique,
            }),
        }
    }

    fn builder(&self) -> Result<BatchBuilder, EngineError> {
        let layout = Layout::Table {
            projection: Some(self.projection.clone()),
        };
        BatchBuilder::new(&self.format.schema, layout, &self.format.limits).map_err(event_error)
    }

    /// The events of a page as batches; nearly always one.
    fn build(&self, page: &[TailRow], out: &mut VecDeque<TailBatch>) -> Result<(), EngineError> {
        let mut builder = self.builder()?;
        let mut received_us = Vec::new();
        let mut ids = Vec::new();
        for row in page {
            // An event parked after the scan's list was made is none of it.
            let id = match &self.places {
                Some(places) => match places.get(&row.id) {
                    Some(&place) => Some((i64::from(PARKED) << 32) | i64::from(place)),
                    None => continue,
                },
                None => None,
            };
            let stamp = EventStamp {
                received_at_us: row.received_at_us,
                shift_us: row.shift_us,
                time_min_us: row.received_at_us.saturating_sub(self.format.time_past_us),
                time_max_us: row
                    .received_at_us
                    .saturating_add(self.format.time_future_us),
                xid: row.txid as i64,
            };
            for event in row.payload.split(|&byte| byte == b'\n') {
                let Ok(event) = std::str::from_utf8(event) else {
                    continue;
                };
                if event.is_empty() {
                    continue;
                }
                if let Err(EventError::BatchFull) = builder.push(event, &stamp) {
                    out.push_back(self.finish(builder, &mut received_us, &mut ids)?);
                    builder = self.builder()?;
                    // What does not even fit alone is what the digest sets aside too, as any other bad event.
                    let _parked = builder.push(event, &stamp);
                }
                // An event that was refused has no row.
                received_us.resize(builder.rows(), row.received_at_us);
                if let Some(id) = id {
                    ids.resize(builder.rows(), id);
                }
            }
        }
        out.push_back(self.finish(builder, &mut received_us, &mut ids)?);
        Ok(())
    }

    /// The batch that was built, with the identities of its rows where they are wanted.
    fn finish(
        &self,
        builder: BatchBuilder,
        received_us: &mut Vec<i64>,
        ids: &mut Vec<i64>,
    ) -> Result<TailBatch, EngineError> {
        let batch = builder.finish().map_err(event_error)?.batch;
        Ok(TailBatch {
            batch: match self.places {
                Some(_) => rows::with_rows(&batch, std::mem::take(ids).into())?,
                None => batch,
            },
            received_us: std::mem::take(received_us),
        })
    }

    /// The events of a batch that are no copies of others.
    async fn without_copies(
        &self,
        unique: &mut Unique,
        tail: TailBatch,
    ) -> Result<RecordBatch, EngineError> {
        let Some(question) = unique.question(&tail.batch, &tail.received_us)? else {
            return Ok(tail.batch);
        };
        let known = if unique.may_be_known() {
            let (ids, window_us) = (question.entries.clone(), unique.window_us());
            ask(&self.sender, |reply| Message::Known {
                ids,
                window_us,
                reply,
            })
            .await
            .ok_or_else(gone)?
        } else {
            Vec::new()
        };
        unique.filter(tail.batch, &question, &known)
    }
}

fn event_error(error: EventError) -> EngineError {
    EngineError::Host {
        sqlstate: error.sqlstate().to_owned(),
        message: error.to_string(),
        hint: error.hint().map(str::to_owned),
    }
}

#[async_trait]
impl Broker for CollectionBroker {
    async fn chunk(&self, id: i64) -> Result<Bytes, EngineError> {
        ask(&self.sender, |reply| Message::Chunk { id, reply })
            .await
            .ok_or_else(gone)
    }

    async fn tail(&self) -> Result<Option<RecordBatch>, EngineError> {
        let mut state = self.tail.lock().await;
        let tail = loop {
            if let Some(tail) = state.ready.pop_front() {
                break tail;
            }
            let part = self.part;
            let page = ask(&self.sender, |reply| Message::Page { part, reply })
                .await
                .ok_or_else(gone)?;
            let Some(page) = page else {
                return Ok(None);
            };
            self.build(&page, &mut state.ready)?;
        };
        match &mut state.unique {
            Some(unique) => self.without_copies(unique, tail).await.map(Some),
            None => Ok(Some(tail.batch)),
        }
    }
}

/// The objects of the default storage, read through the backend's thread.
pub struct ObjectSource {
    sender: Sender<Message>,
    sizes: Arc<HashMap<String, u64>>,
}

impl ObjectSource {
    /// `sizes` are those of the manifest, by path.
    pub fn new(sender: Sender<Message>, sizes: Arc<HashMap<String, u64>>) -> Arc<Self> {
        Arc::new(Self { sender, sizes })
    }
}

impl fmt::Debug for ObjectSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectSource").finish_non_exhaustive()
    }
}

#[async_trait]
impl PartSource for ObjectSource {
    async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, LakeError> {
        let wanted = range.end - range.start;
        let bytes = ask(&self.sender, |reply| Message::Object {
            path: path.to_owned(),
            range,
            reply,
        })
        .await;
        match bytes {
            Some(bytes) if bytes.is_empty() && wanted > 0 => Err(LakeError::Missing {
                path: path.to_owned(),
            }),
            Some(bytes) => Ok(bytes),
            None => Err(LakeError::Corrupt {
                what: "object",
                reason: "the scan was ended".to_owned(),
            }),
        }
    }

    async fn size(&self, path: &str) -> Result<u64, LakeError> {
        self.sizes
            .get(path)
            .copied()
            .ok_or_else(|| LakeError::Missing {
                path: path.to_owned(),
            })
    }
}
