//! One execution of a scan: a task on the engine's threads that sends batches, and this thread, which takes them and
//! answers the engine's questions while it waits.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;
use bytes::Bytes;
use futures::StreamExt;
use pgrx::pg_sys;
use rakam_engine::context::BATCH_ROWS;
use rakam_engine::rows::ROW_FIELD_ID;
use rakam_engine::{
    Broker, EngineContext, EngineError, Part, ScanInput, ScanMetrics, ScanPlan, ScanStream, all,
    execute, execute_all,
};
use rakam_event::entry::Limits;
use tokio::sync::Semaphore;

use super::broker::{CollectionBroker, Message, TailFormat};
use super::identity::Objects;
use super::tiers::{self, Skipped, Stores, Visible};
use super::unique::Unique;
use crate::catalog::inbox::{self, Tail, TailRow};
use crate::catalog::manifest;
use crate::ingest::known;
use crate::pg::runtime::{Port, Runtime, Sender, port};
use crate::pg::security::ActAs;
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::{PgError, Result, guc, memory, xact};

/// Messages that may wait in a scan's port.
const PORT_MESSAGES: usize = 64;
/// Batches that may wait for this thread.
const WAITING_BATCHES: usize = 2;
/// How long the end of a scan waits for its task before it takes the engine's threads out of use.
const END_GRACE: Duration = Duration::from_millis(20);

/// What EXPLAIN ANALYZE tells of a scan, over all its executions.
#[derive(Debug, Clone, Copy, Default)]
pub struct Done {
    pub skipped: Skipped,
    pub inbox_rows: u64,
    pub metrics: ScanMetrics,
}

impl Done {
    /// Adds what an execution did.
    pub fn add(&mut self, metrics: &ScanMetrics) {
        let sum = &mut self.metrics;
        sum.files_opened += metrics.files_opened;
        sum.files_skipped += metrics.files_skipped;
        sum.bytes_read += metrics.bytes_read;
        sum.row_groups_read += metrics.row_groups_read;
        sum.row_groups_pruned_by_stats += metrics.row_groups_pruned_by_stats;
        sum.row_groups_pruned_by_bloom += metrics.row_groups_pruned_by_bloom;
        sum.pages_pruned += metrics.pages_pruned;
        sum.chunks_read += metrics.chunks_read;
        sum.tail_rows += metrics.tail_rows;
        sum.rows_out += metrics.rows_out;
    }
}

/// An execution in progress.
pub struct Running {
    runtime: Arc<Runtime>,
    task: tokio::task::JoinHandle<()>,
    port: Port<Message>,
    /// What the engine asks about; None: a scan of files that are not ours.
    inbox: Option<Inbox>,
    /// The task has said that it is done.
    finished: bool,
    metrics: Arc<Mutex<ScanMetrics>>,
}

/// The un-digested events of an execution.
struct Inbox {
    tick: inbox::Tick,
    project_id: i32,
    tails: Vec<Tail>,
    /// The first rows of the only collection, read before the engine asked.
    first_page: Option<Vec<TailRow>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        self.task.abort();
        let end = Instant::now() + END_GRACE;
        while !self.task.is_finished() {
            if Instant::now() >= end {
                // Stopping is cooperative: the next query gets threads of its own.
                self.runtime.retire();
                return;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// Begins an execution, as the effective user; None if there is nothing to read. With `only` the rows of those objects
/// tell which they are.
pub fn start(
    view: View,
    visible: &Visible,
    plan: ScanPlan,
    is_all: bool,
    only: Option<&Arc<Objects>>,
    stores: &mut Stores,
    done: &mut Done,
) -> Result<Option<Running>> {
    let (sender, port) = port(PORT_MESSAGES)?;
    let mut job = Job {
        view,
        visible,
        only,
        stores,
        skipped: &mut done.skipped,
        sender: &sender,
        tails: Vec::new(),
        first_page: None,
    };
    let open: Open = if is_all {
        let parts = job.all(&plan)?;
        if parts.is_empty() {
            return Ok(None);
        }
        Box::new(move |ctx| execute_all(plan, parts, ctx))
    } else {
        let Some((input, broker)) = job.one(plan)? else {
            return Ok(None);
        };
        Box::new(move |ctx| execute(input, broker, ctx))
    };
    let inbox = Inbox {
        tick: visible.tick.clone(),
        project_id: visible.project_id,
        tails: job.tails,
        first_page: job.first_page,
    };
    launch(open, sender, port, Some(inbox)).map(Some)
}

/// Begins a scan whose rows all come from `broker`, which asks nothing of this thread.
pub fn start_alone(input: ScanInput, broker: Arc<dyn Broker>) -> Result<Running> {
    let (sender, port) = port(PORT_MESSAGES)?;
    let open: Open = Box::new(move |ctx| execute(input, broker, ctx));
    launch(open, sender, port, None)
}

fn launch(
    open: Open,
    sender: Sender<Message>,
    port: Port<Message>,
    inbox: Option<Inbox>,
) -> Result<Running> {
    let runtime = Runtime::current()?;
    let ctx = engine_context(&runtime)?;
    let metrics = Arc::new(Mutex::new(ScanMetrics::default()));
    let task = runtime.spawn(run(open, ctx, sender, Arc::clone(&metrics)));
    Ok(Running {
        runtime,
        task,
        port,
        inbox,
        finished: false,
        metrics,
    })
}

impl Running {
    /// The next batch, answering the engine's questions meanwhile; None at the end.
    pub fn next_batch(
        &mut self,
        user: pg_sys::Oid,
        view: View,
        done: &mut Done,
    ) -> Result<Option<RecordBatch>> {
        loop {
            match self.port.receive() {
                Some(Message::Batch(batch, permit)) => {
                    drop(permit);
                    return Ok(Some(batch));
                }
                Some(Message::Done(result)) => {
                    self.finished = true;
                    return result.map(|()| None).map_err(engine_error);
                }
                None => {
                    self.finished = true;
                    return Err(PgError::internal("the query engine ended without a result"));
                }
                Some(question) => {
                    let _user = ActAs::user(user);
                    self.answer(question, view, done)?;
                }
            }
        }
    }

    /// What was done so far.
    pub fn metrics(&self) -> ScanMetrics {
        *self.metrics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads for the engine what it asked for. An answer that nobody waits for any more is dropped.
    fn answer(&mut self, question: Message, view: View, done: &mut Done) -> Result<()> {
        let Some(inbox) = &mut self.inbox else {
            return Err(PgError::internal("a scan of files asked for events"));
        };
        match question {
            Message::Chunk { id, reply } => {
                let data = manifest::chunk_data(view, id)?.ok_or_else(|| {
                    PgError::internal("a chunk that was listed is not visible any more")
                })?;
                let _ = reply.send(Bytes::from(data));
            }
            Message::Page { part, reply } => {
                let page = match inbox.first_page.take() {
                    Some(page) => Some(page),
                    None => match inbox.tails.get_mut(part) {
                        Some(tail) => tail.next_page(view)?,
                        None => None,
                    },
                };
                match &page {
                    Some(rows) => done.inbox_rows += rows.len() as u64,
                    None => check_truncation(view, &inbox.tick)?,
                }
                let _ = reply.send(page);
            }
            Message::Known {
                ids,
                window_us,
                reply,
            } => {
                let known = known::known(view, inbox.project_id, window_us, &ids)?;
                let _ = reply.send(known);
            }
            Message::Object { path, range, reply } => {
                let bytes =
                    manifest::object_range(view, &path, range.start, range.end - range.start)?;
                let _ = reply.send(Bytes::from(bytes));
            }
            Message::Batch(..) | Message::Done(_) => {}
        }
        Ok(())
    }
}

/// What an execution is made of, while it is put together.
struct Job<'a> {
    view: View,
    visible: &'a Visible,
    only: Option<&'a Arc<Objects>>,
    stores: &'a mut Stores,
    skipped: &'a mut Skipped,
    sender: &'a Sender<Message>,
    tails: Vec<Tail>,
    first_page: Option<Vec<TailRow>>,
}

impl Job<'_> {
    /// A scan of one collection; None if it has nothing to read.
    fn one(&mut self, mut plan: ScanPlan) -> Result<Option<(ScanInput, Arc<CollectionBroker>)>> {
        let part = self
            .visible
            .parts
            .first()
            .ok_or_else(|| PgError::internal("a visible table has a collection"))?;
        let only = self.only.map(AsRef::as_ref);
        if let Some(late) = only.and_then(|only| only.late.as_ref()) {
            plan.leave_out_of(late);
        }
        let wanted = plan.clone();
        let kept_since_us = part.collection.kept_since_us;
        if let Some(from_us) = kept_since_us {
            plan.leave_out_before(from_us);
        }
        let mut stored = tiers::stored(self.view, part, plan.filter.as_ref(), only, self.skipped)?;
        let files = stored.open(self.view, self.stores, self.sender)?;
        let mut tail = self.tail(part);
        // Most often there is none: asking here saves the engine a question.
        self.first_page = tail.next_page(self.view)?;
        if self.first_page.is_none() {
            check_truncation(self.view, &self.visible.tick)?;
        }
        self.tails.push(tail);
        if files.is_empty() && stored.chunks.is_empty() && self.first_page.is_none() {
            return Ok(None);
        }
        if kept_since_us.is_some_and(|from_us| stored.min_time_us >= from_us)
            && self.first_page.is_none()
        {
            // Nothing is too old: no need to look at each row.
            plan = wanted;
        }
        let broker = self.broker(0, part, plan.needed());
        let input = ScanInput {
            schema: part.schema.clone(),
            plan,
            files,
            chunks: stored.chunks,
            has_tail: self.first_page.is_some(),
        };
        Ok(Some((input, broker)))
    }

    /// A scan of all collections of the project.
    fn all(&mut self, plan: &ScanPlan) -> Result<Vec<Part>> {
        let visible = self.visible;
        let mut parts = Vec::new();
        for part in &visible.parts {
            let name = &part.collection.name;
            if !tiers::name_may_match(plan.filter.as_ref(), name) {
                continue;
            }
            let from_us = part.collection.kept_since_us;
            let own = all::part_plan(plan, name, &part.schema, from_us).map_err(engine_error)?;
            let mut stored =
                tiers::stored(self.view, part, own.filter.as_ref(), None, self.skipped)?;
            let files = stored.open(self.view, self.stores, self.sender)?;
            let broker = self.broker(self.tails.len(), part, own.needed());
            let tail = self.tail(part);
            self.tails.push(tail);
            parts.push(Part {
                collection: name.clone(),
                schema: part.schema.clone(),
                files,
                chunks: stored.chunks,
                has_tail: true,
                from_us,
                broker,
            });
        }
        Ok(parts)
    }

    fn tail(&self, part: &tiers::Seen) -> Tail {
        let collection = &part.collection;
        if self.only.is_some() {
            return Tail::of_parked(collection.project_id, collection.id, &collection.name);
        }
        Tail::new(
            &self.visible.tick,
            collection.project_id,
            collection.id,
            &collection.name,
        )
    }

    fn broker(
        &self,
        index: usize,
        part: &tiers::Seen,
        mut needed: Vec<i32>,
    ) -> Arc<CollectionBroker> {
        // That is no field of an event.
        needed.retain(|id| *id != ROW_FIELD_ID);
        let format = TailFormat {
            schema: part.schema.clone(),
            limits: Limits {
                max_event_bytes: guc::max_event_bytes(),
                max_string_bytes: guc::max_string_bytes(),
                max_fields: guc::max_fields(),
            },
            time_past_us: self.visible.time_past_us,
            time_future_us: self.visible.time_future_us,
        };
        // Who tells the rows' identities wants the copies, too.
        let window_us = guc::dedupe_window_us().filter(|_| self.only.is_none());
        let unique = window_us.map(|window_us| {
            let memory = memory::pool().reserve("ids of the inbox tail");
            Unique::new(part.collection.id, window_us, memory)
        });
        Arc::new(CollectionBroker::new(
            self.sender.clone(),
            index,
            format,
            needed,
            unique,
            self.only.map(|only| Arc::clone(&only.parked)),
        ))
    }
}

/// On a standby the truncation of an inbox table is replayed without regard to snapshots that have not locked it:
/// rows that this one should see may be gone.
fn check_truncation(view: View, tick: &inbox::Tick) -> Result<()> {
    // Promoted since: what was replayed before is gone all the same.
    if !xact::in_recovery() && !view.is_of_recovery() {
        return Ok(());
    }
    let latest = Registered::latest();
    if inbox::rotation::truncated_to(View::Under(latest.get()))? > tick.id {
        return Err(PgError::new(
            "40001",
            "could not read recent events: the snapshot is too old for this standby",
        )
        .hint("Run the transaction again."));
    }
    Ok(())
}

/// Starts the engine's stream, on an engine thread.
type Open = Box<dyn FnOnce(&EngineContext) -> std::result::Result<ScanStream, EngineError> + Send>;

/// The engine's side of an execution.
async fn run(
    open: Open,
    ctx: EngineContext,
    sender: Sender<Message>,
    metrics: Arc<Mutex<ScanMetrics>>,
) {
    let mut stream = match open(&ctx) {
        Ok(stream) => stream,
        Err(error) => {
            sender.send(Message::Done(Err(error))).await;
            return;
        }
    };
    let window = Arc::new(Semaphore::new(WAITING_BATCHES));
    while let Some(next) = stream.next().await {
        let now = stream.metrics();
        *metrics.lock().unwrap_or_else(PoisonError::into_inner) = now;
        let message = match next {
            Ok(batch) => match Arc::clone(&window).acquire_owned().await {
                Ok(permit) => Message::Batch(batch, permit),
                Err(_) => return,
            },
            Err(error) => {
                sender.send(Message::Done(Err(error))).await;
                return;
            }
        };
        if !sender.send(message).await {
            return;
        }
    }
    *metrics.lock().unwrap_or_else(PoisonError::into_inner) = stream.metrics();
    drop(stream);
    sender.send(Message::Done(Ok(()))).await;
}

thread_local! {
    static CONTEXT: RefCell<Option<(usize, EngineContext)>> = const { RefCell::new(None) };
}

/// The engine of this process, made anew when `rakam.threads` changes. Its memory is the server's.
fn engine_context(runtime: &Runtime) -> Result<EngineContext> {
    let (threads, pool) = (runtime.threads(), memory::pool());
    let cached = CONTEXT.with_borrow(|cached| match cached {
        Some((t, ctx)) if *t == threads => Some(ctx.clone()),
        _ => None,
    });
    if let Some(ctx) = cached {
        return Ok(ctx);
    }
    let ctx = EngineContext::with_pool(threads, BATCH_ROWS, pool).map_err(engine_error)?;
    CONTEXT.set(Some((threads, ctx.clone())));
    Ok(ctx)
}

/// An error of the engine as it leaves to the client.
fn engine_error(error: EngineError) -> PgError {
    let answer = PgError::new(error.sqlstate(), error.message());
    match error.hint() {
        Some(hint) => answer.hint(hint),
        None => answer,
    }
}
