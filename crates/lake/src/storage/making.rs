//! An object in the making, for content that is never in memory as a whole: in parts, and there all at once or not at all.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{FuturesOrdered, StreamExt};
use object_store::PutPayload;
use object_store::multipart::PartId;
use object_store::path::Path;

use super::bucket::{Bucket, PART_BYTES, PARTS_AT_A_TIME, Pause};
use super::reason::{Meaning, explain};
use crate::error::LakeError;

/// More parts than these no store takes.
const MAX_PARTS: usize = 10_000;

type Result<T> = std::result::Result<T, LakeError>;
type Sending = futures::future::BoxFuture<'static, Result<PartId>>;

/// An object of which parts are given as they come. Nothing is there under its name before [`Making::complete`].
///
/// Dropped before its end it leaves an unfinished upload: [`Making::give_up`] takes that back.
pub struct Making {
    bucket: Arc<Bucket>,
    path: String,
    location: Path,
    /// While the upload begins: those of this name that were there before.
    known_before: Option<Vec<String>>,
    /// Uploads of which nobody knows: begun for this object, and the answer was lost.
    lost: Vec<String>,
    id: Option<String>,
    sending: FuturesOrdered<Sending>,
    sent: Vec<PartId>,
    parts: usize,
    bytes: u64,
}

impl Making {
    pub(super) async fn begin(bucket: Arc<Bucket>, path: &str) -> Result<Self> {
        let location = bucket.location(path)?;
        match bucket.head(path).await {
            Err(LakeError::Missing { .. }) => {}
            Ok(_) => {
                return Err(LakeError::Exists {
                    path: path.to_owned(),
                });
            }
            Err(error) => return Err(error),
        }
        Ok(Self {
            bucket,
            path: path.to_owned(),
            location,
            known_before: None,
            lost: Vec::new(),
            id: None,
            sending: FuturesOrdered::new(),
            sent: Vec::new(),
            parts: 0,
            bytes: 0,
        })
    }

    /// Takes the next [`PART_BYTES`] of the object; waits while as many parts as may be are on their way.
    pub async fn part(&mut self, data: Bytes) -> Result<()> {
        if self.parts == MAX_PARTS {
            return Err(LakeError::TooLarge {
                what: "object",
                bytes: usize::try_from(self.bytes)
                    .unwrap_or(usize::MAX)
                    .saturating_add(data.len()),
                limit: MAX_PARTS * PART_BYTES,
            });
        }
        let id = match &self.id {
            Some(id) => id.clone(),
            None => {
                self.known_before = Some(self.bucket.uploads_of(&self.location).await?);
                let begin = || self.bucket.parts.create_multipart(&self.location);
                let id = self.bucket.retry("write", &self.path, begin).await?;
                self.id = Some(id.clone());
                self.lost = self.unknown().await?;
                self.known_before = None;
                id
            }
        };
        while self.sending.len() >= PARTS_AT_A_TIME {
            self.take_sent().await?;
        }
        let (bucket, location, path) = (
            Arc::clone(&self.bucket),
            self.location.clone(),
            self.path.clone(),
        );
        let number = self.parts;
        self.parts += 1;
        self.bytes += data.len() as u64;
        self.sending.push_back(Box::pin(async move {
            let put = || {
                bucket
                    .parts
                    .put_part(&location, &id, number, PutPayload::from(data.clone()))
            };
            bucket.retry("write", &path, put).await
        }));
        Ok(())
    }

    async fn take_sent(&mut self) -> Result<()> {
        if let Some(part) = self.sending.next().await {
            self.sent.push(part?);
        }
        Ok(())
    }

    /// Drives the parts on their way while the next one is waited for. Never ends by itself.
    pub async fn send(&mut self) -> Result<()> {
        while !self.sending.is_empty() {
            self.take_sent().await?;
        }
        std::future::pending().await
    }

    /// Takes the rest of the object, after which it is there, whole. One that came to be there meanwhile is 58P02, as far as
    /// the store can tell.
    pub async fn complete(&mut self, rest: Bytes) -> Result<()> {
        if self.id.is_none() {
            return self.bucket.put(&self.path, rest).await;
        }
        if !rest.is_empty() {
            self.part(rest).await?;
        }
        while !self.sending.is_empty() {
            self.take_sent().await?;
        }
        match self.bucket.head(&self.path).await {
            Err(LakeError::Missing { .. }) => {}
            Ok(_) => {
                return Err(LakeError::Exists {
                    path: self.path.clone(),
                });
            }
            Err(error) => return Err(error),
        }
        let id = self.id.clone().unwrap_or_default();
        let mut pause = Pause::new(self.bucket.timeout);
        loop {
            let parts = self.sent.clone();
            let done = self
                .bucket
                .parts
                .complete_multipart(&self.location, &id, parts)
                .await;
            let Err(error) = done else { break };
            match explain(&error).meaning {
                // An upload is gone once it is complete: perhaps only the answer was lost.
                Meaning::Missing => match self.bucket.head(&self.path).await {
                    Ok(info) if info.bytes == self.bytes => break,
                    Ok(_) | Err(LakeError::Missing { .. }) => {
                        return Err(LakeError::Unreachable {
                            action: "write",
                            path: self.path.clone(),
                            reason: "the upload was aborted".to_owned(),
                        });
                    }
                    Err(error) => return Err(error),
                },
                Meaning::Transient if pause.take().await => {}
                _ => return Err(LakeError::of_store("write", &self.path, error)),
            }
        }
        self.id = None;
        // It is there: whatever becomes of remains, the object is whole.
        let _found_later = self.abort_lost().await;
        Ok(())
    }

    /// The uploads of this name that came while ours began, but for ours. Those that were there before belong to others, who
    /// may be at work.
    async fn unknown(&mut self) -> Result<Vec<String>> {
        let Some(known) = &self.known_before else {
            return Ok(Vec::new());
        };
        let mut found = self.bucket.uploads_of(&self.location).await?;
        found.retain(|id| !known.contains(id) && self.id.as_ref() != Some(id));
        Ok(found)
    }

    async fn abort_lost(&mut self) -> Result<()> {
        let mut lost = std::mem::take(&mut self.lost);
        lost.extend(self.unknown().await?);
        for id in lost {
            let abort = || self.bucket.parts.abort_multipart(&self.location, &id);
            self.bucket
                .retry("abort the upload of", &self.path, abort)
                .await?;
        }
        Ok(())
    }

    /// Leaves no unfinished upload behind, as well as the store lets it: what stays is found by
    /// [`super::Storage::list_uploads`]. An object whose last answer was lost may be there, whole; it is never deleted,
    /// because by now the name may be somebody else's.
    pub async fn give_up(mut self) -> Result<()> {
        // Parts on their way would come after the end.
        self.sending = FuturesOrdered::new();
        let Some(id) = self.id.take() else {
            return self.abort_lost().await;
        };
        let mut pause = Pause::new(self.bucket.timeout);
        loop {
            let error = match self.bucket.parts.abort_multipart(&self.location, &id).await {
                Ok(()) => return self.abort_lost().await,
                Err(error) => error,
            };
            match explain(&error).meaning {
                Meaning::Missing => return self.abort_lost().await,
                Meaning::Transient if pause.take().await => {}
                _ => {
                    return Err(LakeError::of_store(
                        "abort the upload of",
                        &self.path,
                        error,
                    ));
                }
            }
        }
    }
}
