//! An object that a session writes into a bucket, part by part as they come.
//!
//! A task on the engine's threads sends the parts, and takes everything back when the session gives up: by an error, a
//! cancel, or its end. The session's own thread waits for room only, with interrupts served, and never for the taking back,
//! but when the process ends.

use std::cell::RefCell;
use std::sync::mpsc as std_mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rakam_files::FilesError;
use rakam_files::object::Stop;
use rakam_lake::LakeError;
use rakam_lake::storage::{Making, Storage};
use tokio::sync::mpsc;

use crate::pg::runtime::{self, Port, Runtime};
use crate::pg::{PgError, Result, exit};

/// How long the end of the process waits for what is being taken back.
const EXIT_GRACE: Duration = Duration::from_secs(3);

enum Piece {
    Part(Bytes),
    /// The last of them, after which the object is to be there.
    Rest(Bytes),
}

/// What the session is told: that it may begin, then how it ended.
type Told = std::result::Result<(), FilesError>;

/// An upload that may still have something to take back.
struct Open {
    stop: Stop,
    /// Disconnected when it has nothing any more.
    ended: std_mpsc::Receiver<()>,
}

thread_local! {
    static OPEN: RefCell<Vec<Open>> = const { RefCell::new(Vec::new()) };
}

/// At process exit: nothing is left in the bucket, if that is soon done.
fn take_back() {
    let open = OPEN.take();
    for upload in &open {
        upload.stop.stop();
    }
    let end = Instant::now() + EXIT_GRACE;
    for upload in open {
        // Nothing is ever sent: it is over when the other end is gone.
        let _ = upload
            .ended
            .recv_timeout(end.saturating_duration_since(Instant::now()));
    }
}

/// An object on its way. Dropped before it is complete, nothing is left of it.
pub struct Upload {
    pieces: mpsc::Sender<Piece>,
    told: RefCell<Port<Told>>,
    stop: Stop,
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.stop.stop();
    }
}

impl Upload {
    /// Begins the object `path` of a bucket, which is called `name` in messages. One that is there is 58P02.
    pub fn begin(storage: Storage, path: String, name: &str) -> Result<Self> {
        let runtime = Runtime::current()?;
        exit::on_exit(take_back);
        let (sender, told) = runtime::port(1)?;
        let (pieces, mut taken) = mpsc::channel(1);
        let (is_open, ended) = std_mpsc::channel();
        let (stop, name) = (Stop::new(), name.to_owned());
        let watched = stop.clone();
        // Other queries may give these threads up: the task keeps them until it is through.
        let kept = runtime.clone();
        runtime.spawn(async move {
            let failed = |e: LakeError| FilesError::of_store("write", &name, &e);
            let begin = async { storage.make(&path).await.map_err(failed) };
            match watched.or(begin).await {
                Err(error) => {
                    sender.send(Err(error)).await;
                }
                Ok(mut making) => {
                    sender.send(Ok(())).await;
                    let send = async { send(&mut making, &mut taken).await.map_err(failed) };
                    let outcome = watched.or(send).await;
                    drop(taken);
                    let is_done = outcome.is_ok();
                    sender.send(outcome).await;
                    if !is_done {
                        // What stays is found by the comparison of the storage with its manifest.
                        let _ = making.give_up().await;
                    }
                }
            }
            drop((kept, is_open));
        });
        OPEN.with_borrow_mut(|open| {
            open.retain(|o| o.ended.try_recv() == Err(std_mpsc::TryRecvError::Empty));
            open.push(Open {
                stop: stop.clone(),
                ended,
            });
        });
        let upload = Self {
            pieces,
            told: RefCell::new(told),
            stop,
        };
        upload.hear()?;
        Ok(upload)
    }

    fn hear(&self) -> Result<()> {
        match self.told.borrow_mut().receive() {
            Some(told) => Ok(told?),
            None => Err(PgError::internal("an upload ended without an answer")),
        }
    }

    /// Sends a part, of the size that all but the last have; waits for room.
    pub fn part(&self, part: Bytes) -> Result<()> {
        self.send(Piece::Part(part))
    }

    /// Sends the rest, and waits until the object is there.
    pub fn complete(self, rest: Bytes) -> Result<()> {
        self.send(Piece::Rest(rest))?;
        self.hear()
    }

    fn send(&self, piece: Piece) -> Result<()> {
        let pieces = self.pieces.clone();
        match runtime::wait_for(async move { pieces.send(piece).await.is_ok() })? {
            true => Ok(()),
            // It has ended, and says why.
            false => self.hear(),
        }
    }
}

/// Sends what comes until the object is there.
async fn send(
    making: &mut Making,
    pieces: &mut mpsc::Receiver<Piece>,
) -> std::result::Result<(), LakeError> {
    loop {
        let piece = tokio::select! {
            piece = pieces.recv() => piece,
            failed = making.send() => return failed,
        };
        match piece {
            Some(Piece::Part(part)) => making.part(part).await?,
            Some(Piece::Rest(rest)) => return making.complete(rest).await,
            None => {
                return Err(LakeError::Unreachable {
                    action: "write",
                    path: String::new(),
                    reason: "it was given up".to_owned(),
                });
            }
        }
    }
}
