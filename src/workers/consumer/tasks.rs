//! What runs on the engine's threads for a source: a reader, which polls batches ahead of what is stored, and a lister, which asks
//! which splits there are. They know nothing of the database, and tell the consumer what they find.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rakam_sources::SourceError;
use rakam_sources::batch::{Batch, Limits};
use rakam_sources::position::Position;
use rakam_sources::source::{Ends, Fetch, Lag, Split, Splits, Start};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

use crate::pg::runtime::{Runtime, Sender};
use crate::sources::service::Reach;

/// Batches on their way: one is stored while the next one comes.
const AHEAD: usize = 2;
/// How often it is asked how far behind the splits are, and how soon an answer is noticed while nothing is read.
const LAG_INTERVAL: Duration = Duration::from_secs(2);
const ANSWER_INTERVAL: Duration = Duration::from_millis(50);

/// A message of a source's task. The number is that of the reading it is about.
pub struct Told {
    pub number: u64,
    pub what: What,
}

pub enum What {
    /// A batch, of the generation that the last rewind began.
    Batch(u64, Arc<Batch>),
    /// How far behind the open splits are; an error: nobody knows.
    Lag(Result<Vec<(String, Option<Lag>)>, SourceError>),
    /// The reader has ended.
    Failed(SourceError),
    Listed(Result<Vec<Split>, SourceError>),
    /// Where the splits of a request begin, in its order.
    Located(Result<Vec<Position>, SourceError>),
}

/// To a reader.
enum Command {
    Open(String, Position),
    Close(String),
    Ack(Arc<Batch>),
    /// Everything that is not acknowledged is read again, as batches of this generation.
    Rewind(u64),
    /// Nothing is polled, or again.
    Pause(bool),
    Limit(Limits),
}

/// The consumer's end of a reader, which ends when this is dropped.
pub struct Reader(mpsc::UnboundedSender<Command>);

impl Reader {
    pub fn start(runtime: &Runtime, reach: Reach, number: u64, told: Sender<Told>) -> Self {
        let (sender, commands) = mpsc::unbounded_channel();
        let teller = Teller { number, told };
        runtime.spawn(async move {
            if let Err(error) = read(&reach, commands, &teller).await {
                teller.tell(What::Failed(error)).await;
            }
        });
        Self(sender)
    }

    // One that has ended has said so: its commands are of no interest any more.
    pub fn open(&self, split: &str, from: Position) {
        let _ended = self.0.send(Command::Open(split.to_owned(), from));
    }

    pub fn close(&self, split: &str) {
        let _ended = self.0.send(Command::Close(split.to_owned()));
    }

    pub fn ack(&self, batch: Arc<Batch>) {
        let _ended = self.0.send(Command::Ack(batch));
    }

    pub fn rewind(&self, generation: u64) {
        let _ended = self.0.send(Command::Rewind(generation));
    }

    pub fn pause(&self, paused: bool) {
        let _ended = self.0.send(Command::Pause(paused));
    }

    /// Batches have so much at most from now on.
    pub fn limit(&self, limits: Limits) {
        let _ended = self.0.send(Command::Limit(limits));
    }
}

struct Teller {
    number: u64,
    told: Sender<Told>,
}

impl Teller {
    /// False: nobody listens any more.
    async fn tell(&self, what: What) -> bool {
        let number = self.number;
        self.told.send(Told { number, what }).await
    }
}

/// Reads until the consumer lets go.
async fn read(
    reach: &Reach,
    mut commands: mpsc::UnboundedReceiver<Command>,
    teller: &Teller,
) -> Result<(), SourceError> {
    let mut reading = Reading {
        fetch: reach.fetch().await?,
        open: Vec::new(),
        ahead: 0,
        generation: 0,
        is_paused: false,
        limits: Limits::default(),
        asking: None,
        asked: Instant::now(),
        has_new: false,
    };
    let outcome = reading.run(&mut commands, teller).await;
    // The client of a service may wait for its threads.
    let fetch = reading.fetch;
    let _dropped = spawn_blocking(move || drop(fetch)).await;
    outcome
}

struct Reading {
    fetch: Box<dyn Fetch>,
    open: Vec<String>,
    ahead: usize,
    generation: u64,
    is_paused: bool,
    limits: Limits,
    asking: Option<Asking>,
    asked: Instant,
    /// A split was opened since it was last asked how far behind they are.
    has_new: bool,
}

/// It is being asked where these splits end.
struct Asking {
    splits: Vec<String>,
    ends: JoinHandle<Result<Ends, SourceError>>,
}

impl Reading {
    async fn run(
        &mut self,
        commands: &mut mpsc::UnboundedReceiver<Command>,
        teller: &Teller,
    ) -> Result<(), SourceError> {
        loop {
            let waits = self.open.is_empty() || self.is_paused || self.ahead >= AHEAD;
            let patience = match (waits, &self.asking) {
                (true, None) => LAG_INTERVAL,
                (true, Some(_)) => ANSWER_INTERVAL,
                (false, _) => Duration::ZERO,
            };
            match timeout(patience, commands.recv()).await {
                Ok(Some(command)) => {
                    self.apply(command).await?;
                    continue;
                }
                Ok(None) => return Ok(()),
                Err(_) => {}
            }
            let mut is_through = false;
            if !waits {
                let batch = self.fetch.poll(&self.limits).await?;
                let is_empty = batch.is_empty();
                is_through = is_empty;
                self.ahead += usize::from(!is_empty);
                if (!is_empty || batch.trouble.is_some())
                    && !teller
                        .tell(What::Batch(self.generation, Arc::new(batch)))
                        .await
                {
                    return Ok(());
                }
            }
            if let Some(lags) = self.lags(is_through).await
                && !teller.tell(What::Lag(lags)).await
            {
                return Ok(());
            }
        }
    }

    async fn apply(&mut self, command: Command) -> Result<(), SourceError> {
        match command {
            Command::Open(split, from) => {
                self.fetch.open(&split, from).await?;
                self.has_new = true;
                if !self.open.contains(&split) {
                    self.open.push(split);
                }
            }
            Command::Close(split) => {
                self.open.retain(|open| *open != split);
                self.fetch.close(&split).await?;
            }
            Command::Ack(batch) => {
                self.fetch.ack(&batch);
                self.ahead = self.ahead.saturating_sub(1);
                self.open
                    .retain(|open| !batch.moves.iter().any(|m| m.ended && m.split == *open));
            }
            Command::Rewind(generation) => {
                self.fetch.rewind().await?;
                self.generation = generation;
                self.ahead = 0;
            }
            Command::Pause(paused) => self.is_paused = paused,
            Command::Limit(limits) => self.limits = limits,
        }
        Ok(())
    }

    /// How far behind the splits are, now and then. A service may take its time to say where they end, in which they are
    /// read on; what has been told of them by the time of its answer does not count.
    /// Where nothing is left (`is_through`) a split that was opened since need not wait to hear so.
    async fn lags(
        &mut self,
        is_through: bool,
    ) -> Option<Result<Vec<(String, Option<Lag>)>, SourceError>> {
        if let Some(Asking { splits, ends }) =
            self.asking.take_if(|asking| asking.ends.is_finished())
        {
            let ends = match ends.await {
                Ok(Ok(ends)) => ends,
                Ok(Err(error)) => return Some(Err(error)),
                Err(error) => return Some(Err(SourceError::Misuse(error.to_string()))),
            };
            let (open, fetch) = (&self.open, &mut self.fetch);
            let lags = (splits.into_iter())
                .filter(|split| open.contains(split))
                .map(|split| {
                    let lag = fetch.lag(&split, &ends);
                    (split, lag)
                });
            return Some(Ok(lags.collect()));
        }
        let is_due = self.asked.elapsed() >= LAG_INTERVAL || is_through && self.has_new;
        if self.asking.is_none() && !self.open.is_empty() && is_due {
            self.asked = Instant::now();
            self.has_new = false;
            self.asking = Some(Asking {
                splits: self.open.clone(),
                ends: tokio::spawn(self.fetch.ask_ends()),
            });
        }
        None
    }
}

/// To a lister.
enum Question {
    List,
    Locate(Vec<Split>, Start),
}

/// The consumer's end of a lister, which ends when this is dropped.
pub struct Lister(mpsc::UnboundedSender<Question>);

impl Lister {
    pub fn start(runtime: &Runtime, reach: Reach, number: u64, told: Sender<Told>) -> Self {
        let (sender, questions) = mpsc::unbounded_channel();
        let teller = Teller { number, told };
        runtime.spawn(async move { answer(&reach, questions, &teller).await });
        Self(sender)
    }

    pub fn list(&self) {
        let _ended = self.0.send(Question::List);
    }

    pub fn locate(&self, splits: Vec<Split>, start: Start) {
        let _ended = self.0.send(Question::Locate(splits, start));
    }
}

/// Answers until the consumer lets go.
async fn answer(reach: &Reach, mut questions: mpsc::UnboundedReceiver<Question>, teller: &Teller) {
    let mut client: Option<Box<dyn Splits>> = None;
    while let Some(question) = questions.recv().await {
        let mut splits = match client.take() {
            Some(splits) => Ok(splits),
            None => reach.splits().await,
        };
        let what = match question {
            Question::List => What::Listed(match &mut splits {
                Ok(splits) => splits.list().await,
                Err(error) => Err(error.clone()),
            }),
            Question::Locate(which, start) => What::Located(match &mut splits {
                Ok(splits) => splits.locate(&which, &start).await,
                Err(error) => Err(error.clone()),
            }),
        };
        client = splits.ok();
        if !teller.tell(what).await {
            break;
        }
    }
    let _dropped = spawn_blocking(move || drop(client)).await;
}
