//! The executor's callbacks: from a plan to tuples.
//!
//! A scan starts at its first row: parameters are evaluated, the collection is looked up as the effective user under
//! the query's snapshot, and a task on the engine's threads begins to send batches. Meanwhile this thread waits on
//! the port, answers the engine's questions by reading Postgres, and serves interrupts.
//!
//! The state is freed with the query's memory context, since an error ends a query without `EndForeignScan`.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use pgrx::{PgMemoryContexts, pg_guard, pg_sys};
use rakam_engine::{
    EngineContext, EngineError, Expr, Part, ScanInput, ScanMetrics, ScanPlan, ScanStream, all,
    execute, execute_all,
};
use rakam_event::entry::Limits;
use tokio::sync::Semaphore;

use super::broker::{CollectionBroker, Message, TailFormat};
use super::columns::Column;
use super::options::{self, TableOptions};
use super::plan::ScanSpec;
use super::tiers::{self, Skipped, Stores, Visible};
use super::translate;
use super::tuples::{Output, WINDOW_ROWS, Window};
use super::values::{self, Value};
use super::node;
use crate::catalog::inbox::{self, Tail, TailRow};
use crate::catalog::manifest;
use crate::pg::runtime::{Port, Runtime, Sender, port};
use crate::pg::security::{self, ActAs};
use crate::pg::snapshot::{Registered, Snapshot};
use crate::pg::spi::View;
use crate::pg::error::OrRaise;
use crate::pg::{PgError, Result, guc, xact};

/// Messages that may wait in a scan's port.
const PORT_MESSAGES: usize = 64;
/// Batches that may wait for this thread.
const WAITING_BATCHES: usize = 2;
/// How long the end of a scan waits for its task before it takes the engine's threads out of use.
const END_GRACE: Duration = Duration::from_millis(20);

/// What EXPLAIN ANALYZE tells of a scan, over all its executions.
#[derive(Debug, Clone, Copy, Default)]
pub struct Done {
    pub executions: u64,
    pub skipped: Skipped,
    pub inbox_rows: u64,
    pub metrics: ScanMetrics,
}

pub struct ForeignScan {
    spec: ScanSpec,
    options: TableOptions,
    relation: pg_sys::Oid,
    /// The live columns of the table.
    columns: Vec<Column>,
    user: pg_sys::Oid,
    snapshot: pg_sys::Snapshot,
    params: Vec<(*mut pg_sys::ExprState, ParamKind)>,
    context: *mut pg_sys::ExprContext,
    /// Holds the by-reference values of the current window.
    memory: pg_sys::MemoryContext,
    attributes: usize,
    system_columns: bool,
    /// None: not looked up yet; Some(None): nothing to be seen.
    visible: Option<Option<Visible>>,
    stores: Stores,
    running: Option<Running>,
    ended: bool,
    outputs: Vec<Output>,
    batch: Option<(arrow::array::RecordBatch, usize)>,
    window: Option<Window>,
    pub done: Done,
}

/// What a parameter of the plan is.
#[derive(Debug, Clone, Copy)]
enum ParamKind {
    One(rakam_event::types::FieldType),
    Many(rakam_event::types::FieldType),
    Count,
}

/// An execution in progress.
struct Running {
    runtime: Arc<Runtime>,
    task: tokio::task::JoinHandle<()>,
    port: Port<Message>,
    tick: inbox::Tick,
    tails: Vec<Tail>,
    /// The first inbox rows of the only collection, read before the engine asked.
    first_page: Option<Vec<TailRow>>,
    /// The task has said that it is done.
    finished: bool,
    metrics: Arc<Mutex<ScanMetrics>>,
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

#[pg_guard]
pub unsafe extern "C-unwind" fn begin(node: *mut pg_sys::ForeignScanState, flags: i32) {
    if flags & pg_sys::EXEC_FLAG_EXPLAIN_ONLY as i32 != 0 {
        return;
    }
    // SAFETY: the executor's own structures, valid until the query's context goes; the state goes with it.
    unsafe {
        let plan: *mut pg_sys::ForeignScan = (*node).ss.ps.plan.cast();
        let estate = (*node).ss.ps.state;
        let relation = (*node).ss.ss_currentRelation;
        let spec = ScanSpec::of(plan);
        let states = pg_sys::ExecInitExprList((*plan).fdw_exprs, node.cast());
        let params = node::pointers::<pg_sys::ExprState>(states)
            .into_iter()
            .enumerate()
            .map(|(index, state)| (state, ParamKind::of(&spec, index)))
            .collect();
        let memory = pg_sys::AllocSetContextCreateInternal(
            (*estate).es_query_cxt,
            c"rakam scan".as_ptr(),
            pg_sys::ALLOCSET_DEFAULT_MINSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_INITSIZE as usize,
            pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
        );
        let state = ForeignScan {
            options: options::of_table((*relation).rd_id),
            spec,
            relation: (*relation).rd_id,
            columns: node::columns((*relation).rd_att),
            user: effective_user(plan, estate),
            snapshot: (*estate).es_snapshot,
            params,
            context: (*node).ss.ps.ps_ExprContext,
            memory,
            attributes: (*(*relation).rd_att).natts as usize,
            system_columns: (*plan).fsSystemCol,
            visible: None,
            stores: Stores::default(),
            running: None,
            ended: false,
            outputs: Vec::new(),
            batch: None,
            window: None,
            done: Done::default(),
        };
        let state = PgMemoryContexts::For((*estate).es_query_cxt).leak_and_drop_on_delete(state);
        (*node).fdw_state = state.cast();
    }
}

/// The user as whom the table is read: of a view its owner, else the current one.
unsafe fn effective_user(
    plan: *mut pg_sys::ForeignScan,
    estate: *mut pg_sys::EState,
) -> pg_sys::Oid {
    // SAFETY: the executor's own structures; range table entries count from 1.
    let user = unsafe {
        #[cfg(feature = "pg15")]
        {
            let index = (*plan).scan.scanrelid as i32 - 1;
            let entry = pg_sys::list_nth((*estate).es_range_table, index);
            (*entry.cast::<pg_sys::RangeTblEntry>()).checkAsUser
        }
        #[cfg(not(feature = "pg15"))]
        {
            let _ = estate;
            (*plan).checkAsUser
        }
    };
    if user == pg_sys::InvalidOid {
        security::current_user()
    } else {
        user
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn iterate(
    node: *mut pg_sys::ForeignScanState,
) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: the executor's own structures, and the state made by `begin`.
    unsafe {
        let slot = (*node).ss.ss_ScanTupleSlot;
        pg_sys::ExecClearTuple(slot);
        let state = &mut *(*node).fdw_state.cast::<ForeignScan>();
        loop {
            if let Some(window) = &mut state.window {
                std::slice::from_raw_parts_mut((*slot).tts_isnull, state.attributes).fill(true);
                if window.fill((*slot).tts_values, (*slot).tts_isnull) {
                    return state.store(slot);
                }
            }
            if !state.next_window().or_raise() {
                return slot;
            }
        }
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn rescan(node: *mut pg_sys::ForeignScanState) {
    // SAFETY: the executor's own structures, and the state made by `begin`.
    unsafe {
        let Some(state) = (*node).fdw_state.cast::<ForeignScan>().as_mut() else {
            return;
        };
        let untouched = state.batch.is_none() && state.window.is_none() && !state.ended;
        if !(untouched && (*node).ss.ps.chgParam.is_null()) {
            state.stop();
        }
    }
}

#[pg_guard]
pub unsafe extern "C-unwind" fn end(node: *mut pg_sys::ForeignScanState) {
    // SAFETY: the state made by `begin`; none for EXPLAIN without ANALYZE.
    unsafe {
        if let Some(state) = (*node).fdw_state.cast::<ForeignScan>().as_mut() {
            state.stop();
        }
    }
}

impl ForeignScan {
    /// The filled arrays of the slot as its tuple.
    unsafe fn store(&self, slot: *mut pg_sys::TupleTableSlot) -> *mut pg_sys::TupleTableSlot {
        // SAFETY: the slot is empty and its arrays are filled; a formed tuple lives in the per-tuple context, which
        // is reset after the slot has been cleared.
        unsafe {
            if !self.system_columns {
                return pg_sys::ExecStoreVirtualTuple(slot);
            }
            let tuple = pg_sys::heap_form_tuple(
                (*slot).tts_tupleDescriptor,
                (*slot).tts_values,
                (*slot).tts_isnull,
            );
            // There are no such transactions: what heap_form_tuple leaves there is a row type's header.
            (*(*tuple).t_data).t_choice.t_heap = pg_sys::HeapTupleFields::default();
            (*tuple).t_tableOid = self.relation;
            pg_sys::ExecStoreHeapTuple(tuple, slot, false)
        }
    }

    /// Converts the next rows; false at the end.
    fn next_window(&mut self) -> Result<bool> {
        self.window = None;
        if self.ended {
            return Ok(false);
        }
        if self.running.is_none() && self.batch.is_none() {
            self.start()?;
        }
        loop {
            if let Some((batch, offset)) = self.batch.take() {
                if offset < batch.num_rows() {
                    // SAFETY: the last window's rows are out of use: the slot was cleared.
                    unsafe { pg_sys::MemoryContextReset(self.memory) };
                    let outputs = &self.outputs;
                    // SAFETY: the context is ours and lives as long as the scan.
                    let window = unsafe {
                        PgMemoryContexts::For(self.memory)
                            .switch_to(|_| Window::convert(&batch, offset, outputs))?
                    };
                    self.window = Some(window);
                    self.batch = Some((batch, offset + WINDOW_ROWS));
                    return Ok(true);
                }
            }
            match self.receive()? {
                Some(batch) => self.batch = Some((batch, 0)),
                None => {
                    self.ended = true;
                    self.note_metrics();
                    self.running = None;
                    return Ok(false);
                }
            }
        }
    }

    /// The next batch of the running execution, answering the engine's questions meanwhile.
    fn receive(&mut self) -> Result<Option<arrow::array::RecordBatch>> {
        let Some(running) = &mut self.running else {
            return Ok(None);
        };
        // SAFETY: the executor keeps its snapshot registered while it runs.
        let view = View::Under(unsafe { Snapshot::from_ptr(self.snapshot) });
        loop {
            match running.port.receive() {
                Some(Message::Batch(batch, permit)) => {
                    drop(permit);
                    return Ok(Some(batch));
                }
                Some(Message::Done(result)) => {
                    running.finished = true;
                    return result.map(|()| None).map_err(engine_error);
                }
                None => {
                    running.finished = true;
                    return Err(PgError::internal("the query engine ended without a result"));
                }
                Some(question) => {
                    let _user = ActAs::user(self.user);
                    answer(question, running, view, &mut self.done)?;
                }
            }
        }
    }

    /// Begins an execution.
    fn start(&mut self) -> Result<()> {
        let values = self.param_values()?;
        self.done.executions += 1;
        let _user = ActAs::user(self.user);
        // SAFETY: the executor keeps its snapshot registered while it runs.
        let view = View::Under(unsafe { Snapshot::from_ptr(self.snapshot) });
        if self.visible.is_none() {
            self.visible = Some(tiers::look_up(view, &self.options, &self.columns)?);
        }
        let Some(Some(visible)) = &self.visible else {
            // Nothing that this user may see: no rows, and no word about it.
            return Ok(());
        };
        let (plan, outputs) = bound_plan(&self.spec, &self.options, visible, &self.columns, &values)?;
        self.outputs = outputs;
        let (sender, port) = port(PORT_MESSAGES)?;
        let mut job = Job {
            view,
            visible,
            stores: &mut self.stores,
            skipped: &mut self.done.skipped,
            sender: &sender,
            tails: Vec::new(),
            first_page: None,
        };
        let open: Open = if self.options.is_all() {
            let parts = job.all(&plan)?;
            Box::new(move |ctx| execute_all(plan, parts, ctx))
        } else {
            let (input, broker) = job.one(plan)?;
            Box::new(move |ctx| execute(input, broker, ctx))
        };
        let (tails, first_page) = (job.tails, job.first_page);
        let runtime = Runtime::current()?;
        let ctx = engine_context(&runtime)?;
        let metrics = Arc::new(Mutex::new(ScanMetrics::default()));
        let task = runtime.spawn(run(open, ctx, sender, Arc::clone(&metrics)));
        self.running = Some(Running {
            runtime,
            task,
            port,
            tick: visible.tick.clone(),
            tails,
            first_page,
            finished: false,
            metrics,
        });
        Ok(())
    }

    /// Evaluates the parameters, in the order of the plan.
    fn param_values(&self) -> Result<Vec<Value>> {
        self.params
            .iter()
            .map(|&(state, kind)| {
                let mut is_null = false;
                // SAFETY: the expression was initialised by `begin`; the value is copied before the per-tuple
                // context is reset.
                let value = unsafe {
                    let datum =
                        pg_sys::ExecEvalExprSwitchContext(state, self.context, &mut is_null);
                    match kind {
                        ParamKind::One(ty) => values::scalar(datum, is_null, ty),
                        ParamKind::Many(ty) => values::list(datum, is_null, ty),
                        ParamKind::Count => {
                            Some(Value::Count((!is_null).then_some(datum.value() as i64)))
                        }
                    }
                };
                value.ok_or_else(|| PgError::internal("a parameter is of an unexpected type"))
            })
            .collect()
    }

    fn note_metrics(&mut self) {
        if let Some(running) = &self.running {
            let last = *running.metrics.lock().unwrap_or_else(PoisonError::into_inner);
            let sum = &mut self.done.metrics;
            sum.files_opened += last.files_opened;
            sum.bytes_read += last.bytes_read;
            sum.row_groups_read += last.row_groups_read;
            sum.row_groups_pruned_by_stats += last.row_groups_pruned_by_stats;
            sum.row_groups_pruned_by_bloom += last.row_groups_pruned_by_bloom;
            sum.pages_pruned += last.pages_pruned;
            sum.chunks_read += last.chunks_read;
            sum.tail_rows += last.tail_rows;
            sum.rows_out += last.rows_out;
        }
    }

    /// Ends the execution in progress; the next row starts another one.
    fn stop(&mut self) {
        self.note_metrics();
        self.running = None;
        self.batch = None;
        self.window = None;
        self.ended = false;
    }
}

impl ParamKind {
    /// What the parameter with this index is for.
    fn of(spec: &ScanSpec, index: usize) -> Self {
        fn find(expr: &Expr, wanted: usize) -> Option<ParamKind> {
            match expr {
                Expr::Param { index, ty } => (*index == wanted).then_some(ParamKind::One(*ty)),
                Expr::Cmp { left, right, .. } => find(left, wanted).or_else(|| find(right, wanted)),
                Expr::And(list) | Expr::Or(list) => list.iter().find_map(|e| find(e, wanted)),
                Expr::Not(e) | Expr::IsNull(e) | Expr::IsNotNull(e) => find(e, wanted),
                Expr::Is { expr, .. } | Expr::Like { expr, .. } => find(expr, wanted),
                // A parameter as a list is the whole list.
                Expr::InList { list, .. } => match list[..] {
                    [Expr::Param { index, ty }] if index == wanted => Some(ParamKind::Many(ty)),
                    _ => None,
                },
                Expr::Column(_) | Expr::Literal(_) | Expr::Null(_) => None,
            }
        }
        spec.filter
            .as_ref()
            .and_then(|filter| find(filter, index))
            .unwrap_or(Self::Count)
    }
}

/// The plan with fields and values in it, and where its columns go.
fn bound_plan(
    spec: &ScanSpec,
    options: &TableOptions,
    visible: &Visible,
    columns: &[Column],
    values: &[Value],
) -> Result<(ScanPlan, Vec<Output>)> {
    let mut in_filter = std::collections::BTreeSet::new();
    if let Some(filter) = &spec.filter {
        filter.columns(&mut in_filter);
    }
    let needed: Vec<Column> = columns
        .iter()
        .filter(|c| spec.columns.contains(&c.attnum) || in_filter.contains(&i32::from(c.attnum)))
        .cloned()
        .collect();
    let fields = tiers::fields(options, visible, &needed)?;
    let (mut ids, mut outputs) = (Vec::new(), Vec::new());
    for column in &needed {
        if let Some(&(id, ty)) = fields.get(&column.attnum)
            && spec.columns.contains(&column.attnum)
        {
            ids.push(id);
            outputs.push(Output {
                attribute: column.attnum as usize - 1,
                ty,
            });
        }
    }
    let by_attnum: HashMap<i32, Expr> = needed
        .iter()
        .filter_map(|column| {
            let expr = match fields.get(&column.attnum) {
                Some(&(id, _)) => Expr::Column(id),
                None => Expr::Null(column.field_type()?),
            };
            Some((i32::from(column.attnum), expr))
        })
        .collect();
    let filter = spec
        .filter
        .clone()
        .map(|filter| translate::bind(filter, &by_attnum, values));
    let count = |index: usize| match values.get(index) {
        Some(Value::Count(Some(n))) => Some((*n).max(0) as u64),
        _ => None,
    };
    let limit = spec.limit.and_then(|limit| {
        let offset = limit.offset.and_then(count).unwrap_or(0);
        count(limit.count).map(|n| n.saturating_add(offset))
    });
    let plan = ScanPlan {
        columns: ids,
        filter,
        limit,
    };
    Ok((plan, outputs))
}

/// What an execution is made of, while it is put together.
struct Job<'a> {
    view: View,
    visible: &'a Visible,
    stores: &'a mut Stores,
    skipped: &'a mut Skipped,
    sender: &'a Sender<Message>,
    tails: Vec<Tail>,
    first_page: Option<Vec<TailRow>>,
}

impl Job<'_> {
    /// A scan of one collection.
    fn one(&mut self, plan: ScanPlan) -> Result<(ScanInput, Arc<CollectionBroker>)> {
        let part = self
            .visible
            .parts
            .first()
            .ok_or_else(|| PgError::internal("a visible table has a collection"))?;
        let mut stored = tiers::stored(self.view, part, plan.filter.as_ref(), self.skipped)?;
        let files = stored.open(self.view, self.stores, self.sender)?;
        let mut tail = self.tail(part);
        // Most often there is none: asking here saves the engine a question.
        self.first_page = tail.next_page(self.view)?;
        if self.first_page.is_none() {
            check_truncation(&self.visible.tick)?;
        }
        self.tails.push(tail);
        let broker = self.broker(0, part, plan.needed());
        let input = ScanInput {
            schema: part.schema.clone(),
            plan,
            files,
            chunks: stored.chunks,
            has_tail: self.first_page.is_some(),
        };
        Ok((input, broker))
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
            let own = all::part_plan(plan, name, &part.schema).map_err(engine_error)?;
            let mut stored = tiers::stored(self.view, part, own.filter.as_ref(), self.skipped)?;
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
                broker,
            });
        }
        Ok(parts)
    }

    fn tail(&self, part: &tiers::Seen) -> Tail {
        let collection = &part.collection;
        Tail::new(
            &self.visible.tick,
            collection.project_id,
            collection.id,
            &collection.name,
        )
    }

    fn broker(&self, index: usize, part: &tiers::Seen, needed: Vec<i32>) -> Arc<CollectionBroker> {
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
        Arc::new(CollectionBroker::new(
            self.sender.clone(),
            index,
            format,
            needed,
        ))
    }
}

/// Reads for the engine what it asked for. An answer that nobody waits for any more is dropped.
fn answer(question: Message, running: &mut Running, view: View, done: &mut Done) -> Result<()> {
    match question {
        Message::Chunk { id, reply } => {
            let data = manifest::chunk_data(view, id)?.ok_or_else(|| {
                PgError::internal("a chunk that was listed is not visible any more")
            })?;
            let _ = reply.send(Bytes::from(data));
        }
        Message::Page { part, reply } => {
            let page = match running.first_page.take() {
                Some(page) => Some(page),
                None => match running.tails.get_mut(part) {
                    Some(tail) => tail.next_page(view)?,
                    None => None,
                },
            };
            match &page {
                Some(rows) => done.inbox_rows += rows.len() as u64,
                None => check_truncation(&running.tick)?,
            }
            let _ = reply.send(page);
        }
        Message::Object { path, range, reply } => {
            let bytes = manifest::object_range(view, &path, range.start, range.end - range.start)?;
            let _ = reply.send(Bytes::from(bytes));
        }
        Message::Batch(..) | Message::Done(_) => {}
    }
    Ok(())
}

/// On a standby the truncation of an inbox table is replayed without regard to snapshots that have not locked it:
/// rows that this one should see may be gone.
fn check_truncation(tick: &inbox::Tick) -> Result<()> {
    if !xact::in_recovery() {
        return Ok(());
    }
    let latest = Registered::latest();
    if inbox::truncated_to(View::Under(latest.get()))? > tick.id {
        return Err(
            PgError::new("40001", "could not read recent events: the snapshot is too old for this standby")
                .hint("Run the transaction again."),
        );
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
    static CONTEXT: RefCell<Option<(usize, usize, EngineContext)>> = const { RefCell::new(None) };
}

/// The engine of this process, whose memory its queries share; made anew when a setting changes.
fn engine_context(runtime: &Runtime) -> Result<EngineContext> {
    let (threads, memory) = (runtime.threads(), guc::memory_limit_bytes());
    let cached = CONTEXT.with_borrow(|cached| match cached {
        Some((t, m, ctx)) if (*t, *m) == (threads, memory) => Some(ctx.clone()),
        _ => None,
    });
    if let Some(ctx) = cached {
        return Ok(ctx);
    }
    let ctx = EngineContext::new(threads, memory).map_err(engine_error)?;
    CONTEXT.set(Some((threads, memory, ctx.clone())));
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
