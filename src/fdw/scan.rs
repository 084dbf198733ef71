//! The executor's callbacks: from a plan to tuples.
//!
//! A scan starts at its first row: parameters are evaluated, the collection is looked up as the effective user under
//! the query's snapshot, and an [`execution`] begins. Its state is freed with the query's memory context, since an
//! error ends a query without `EndForeignScan`.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use arrow::array::{AsArray, Int64Array, RecordBatch};
use arrow::datatypes::Int64Type;
use pgrx::{PgMemoryContexts, pg_guard, pg_sys};
use rakam_engine::rows::ROW_FIELD_ID;
use rakam_engine::{Expr, ScanPlan};
use rakam_event::types::FieldType;
use rakam_lake::cache::Counts;

use super::columns::Column;
use super::execution::{self, Done, Running};
use super::files;
use super::identity::{self, Objects};
use super::node;
use super::options::{self, TableOptions};
use super::plan::ScanSpec;
use super::tiers::{self, Stores, Visible};
use super::translate;
use super::tuples::{Output, WINDOW_ROWS, Window};
use super::values::{self, Value};
use crate::catalog::attached;
use crate::pg::error::OrRaise;
use crate::pg::security::{self, ActAs};
use crate::pg::snapshot::Snapshot;
use crate::pg::spi::View;
use crate::pg::{PgError, Result, cache};

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
    /// The rows tell which they are: see [`identity`].
    identity: Option<Arc<Objects>>,
    /// None: not looked up yet; Some(None): nothing to be seen.
    visible: Option<Option<Visible>>,
    stores: Stores,
    running: Option<Running>,
    ended: bool,
    outputs: Vec<Output>,
    batch: Option<(RecordBatch, usize)>,
    window: Option<Window>,
    done: Done,
}

/// What a parameter of the plan is.
#[derive(Debug, Clone, Copy)]
enum ParamKind {
    One(FieldType),
    Many(FieldType),
    Count,
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
            identity: identity::take((*relation).rd_id, (*plan).scan.scanrelid),
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
                    let row = window.row();
                    return state.store(slot, row);
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
    unsafe fn store(
        &self,
        slot: *mut pg_sys::TupleTableSlot,
        row: Option<i64>,
    ) -> *mut pg_sys::TupleTableSlot {
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
            if let Some(row) = row {
                (*tuple).t_self = identity::ctid(row);
            }
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
            if let Some((batch, offset)) = self.batch.take()
                && offset < batch.num_rows()
            {
                // SAFETY: the last window's rows are out of use: the slot was cleared.
                unsafe { pg_sys::MemoryContextReset(self.memory) };
                let outputs = &self.outputs;
                let rows = match &self.identity {
                    Some(_) => Some(row_ids(&batch)?),
                    None => None,
                };
                // SAFETY: the context is ours and lives as long as the scan.
                let window = unsafe {
                    PgMemoryContexts::For(self.memory)
                        .switch_to(|_| Window::convert(&batch, offset, outputs, rows))?
                };
                self.window = Some(window);
                self.batch = Some((batch, offset + WINDOW_ROWS));
                return Ok(true);
            }
            let view = self.view();
            let next = match &mut self.running {
                Some(running) => running.next_batch(self.user, view, &mut self.done)?,
                None => None,
            };
            let Some(batch) = next else {
                self.finish();
                self.ended = true;
                return Ok(false);
            };
            self.batch = Some((batch, 0));
        }
    }

    /// Begins an execution; without one there are no rows.
    fn start(&mut self) -> Result<()> {
        // As the current user, as whom Postgres would evaluate them.
        let values = self.param_values()?;
        let _user = ActAs::user(self.user);
        let view = self.view();
        if let Some(name) = self.options.attached.clone() {
            return self.start_attached(view, &name, &values);
        }
        if self.visible.is_none() {
            self.visible = Some(tiers::look_up(
                view,
                self.relation,
                &self.options,
                &self.columns,
            )?);
        }
        let Some(Some(visible)) = &self.visible else {
            // Nothing that this user may see: no rows, and no word about it.
            return Ok(());
        };
        let (mut plan, outputs) = bound_plan(&self.spec, &self.columns, &values, |needed| {
            tiers::fields(&self.options, visible, needed)
        })?;
        self.outputs = outputs;
        if self.identity.is_some() {
            plan.columns.push(ROW_FIELD_ID);
        }
        self.running = execution::start(
            view,
            visible,
            plan,
            self.options.is_all(),
            self.identity.as_ref(),
            &mut self.stores,
            &mut self.done,
        )?;
        Ok(())
    }

    /// Begins to read attached files, if this user may.
    fn start_attached(&mut self, view: View, name: &str, values: &[Value]) -> Result<()> {
        let Some(table) = attached::find(view, &self.options.project, name)? else {
            return Ok(());
        };
        let (plan, outputs) = bound_plan(&self.spec, &self.columns, values, |needed| {
            Ok(files::fields(needed))
        })?;
        self.outputs = files::outputs(&self.columns, outputs);
        self.running = Some(files::start(view, &table, &self.columns, plan)?);
        Ok(())
    }

    fn view(&self) -> View {
        // SAFETY: the executor keeps its snapshot registered while it runs.
        View::Under(unsafe { Snapshot::from_ptr(self.snapshot) })
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

    /// Whether its rows come from attached files.
    pub fn reads_files(&self) -> bool {
        self.options.attached.is_some()
    }

    /// What was read from buckets, by all executions.
    pub fn counts(&self) -> Counts {
        self.stores.counts()
    }

    /// What was done, by the execution in progress as well.
    pub fn done_so_far(&self) -> Done {
        let mut done = self.done;
        if let Some(running) = &self.running {
            done.add(&running.metrics());
        }
        done
    }

    fn finish(&mut self) {
        if let Some(running) = self.running.take() {
            self.done.add(&running.metrics());
            cache::report();
        }
    }

    /// Ends the execution in progress; the next row starts another one.
    fn stop(&mut self) {
        self.finish();
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

/// The last column of a batch whose rows tell which they are.
fn row_ids(batch: &RecordBatch) -> Result<&Int64Array> {
    batch
        .columns()
        .last()
        .and_then(|column| column.as_primitive_opt::<Int64Type>())
        .ok_or_else(|| PgError::internal("the engine gave no identities of rows"))
}

/// The plan with fields and values in it, and where its columns go.
fn bound_plan(
    spec: &ScanSpec,
    columns: &[Column],
    values: &[Value],
    fields: impl FnOnce(&[Column]) -> Result<HashMap<i16, (i32, FieldType)>>,
) -> Result<(ScanPlan, Vec<Output>)> {
    let mut in_filter = BTreeSet::new();
    if let Some(filter) = &spec.filter {
        filter.columns(&mut in_filter);
    }
    let needed: Vec<Column> = columns
        .iter()
        .filter(|c| spec.columns.contains(&c.attnum) || in_filter.contains(&i32::from(c.attnum)))
        .cloned()
        .collect();
    let fields = fields(&needed)?;
    let (mut ids, mut outputs) = (Vec::new(), Vec::new());
    for column in &needed {
        if let Some(&(id, ty)) = fields.get(&column.attnum)
            && spec.columns.contains(&column.attnum)
        {
            ids.push(id);
            outputs.push(Output {
                attribute: column.attnum as usize - 1,
                ty,
                input: None,
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
