//! A file or chunk of any schema version → the table as it is now, column by column, matched by field id.
//!
//! One set of physical expressions serves both tiers: DataFusion evaluates them inside the Parquet scan (so that
//! filters on columns the file has still prune row groups and pages), and [`adapt`] evaluates them on a decoded
//! chunk. Per wanted field: the file has it → that column; it has not, but has `_extra` → the value is promoted
//! from there; else NULL. `_extra` itself loses what was promoted and gains the *pending* fields, those in the file
//! that are no column of the foreign table yet.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, RecordBatch, RecordBatchOptions};
use arrow::datatypes::{
    DataType, Int64Type, Schema as ArrowSchema, SchemaRef, TimestampMicrosecondType,
};
use datafusion_common::tree_node::{Transformed, TransformedResult, TreeNode};
use datafusion_common::{Result as DfResult, ScalarValue};
use datafusion_expr::ColumnarValue;
use datafusion_physical_expr::PhysicalExpr;
use datafusion_physical_expr::expressions::{CastExpr, Column, Literal};
use datafusion_physical_expr_adapter::{PhysicalExprAdapter, PhysicalExprAdapterFactory};
use rakam_event::extra;
use rakam_event::schema::{
    DroppedField, EXTRA, FIELD_ID_KEY, FIRST_USER_FIELD_ID, Field, RECEIVED_AT, Schema, XID,
    XID_FIELD_ID,
};
use rakam_event::types::FieldType;

use crate::error::EngineError;
use crate::translate::{Filter, target_name};

type Physical = Arc<dyn PhysicalExpr>;

pub(crate) const EXTRA_FIELD_ID: i32 = 10;
pub(crate) const RECEIVED_AT_FIELD_ID: i32 = 9;

/// The hidden field of chunks and files.
pub(crate) fn xid_field() -> Field {
    Field {
        id: XID_FIELD_ID,
        name: XID.to_owned(),
        ty: FieldType::Int8,
        added_version: 0,
        column_ready: true,
    }
}

/// What a scan produces and the collection it reads.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) schema: Schema,
    /// The wanted columns.
    pub(crate) targets: Vec<Field>,
    /// The targets under the names of [`target_name`].
    pub(crate) target_schema: SchemaRef,
}

impl Table {
    /// The expressions over `file` that give the targets.
    pub(crate) fn expressions(
        &self,
        file: &ArrowSchema,
        stored: Stored,
    ) -> Result<Vec<Physical>, EngineError> {
        let file = FileColumns::new(file);
        self.targets
            .iter()
            .map(|target| self.expression(target, &file, stored))
            .collect()
    }

    /// The fields to decode of a chunk so that [`Table::expressions`] finds what it needs.
    pub(crate) fn needs(&self, has_extra: bool) -> Vec<i32> {
        let mut ids: Vec<i32> = self.targets.iter().map(|target| target.id).collect();
        let wants_extra = ids.contains(&EXTRA_FIELD_ID);
        if has_extra && !wants_extra {
            ids.push(EXTRA_FIELD_ID);
        }
        if has_extra && !self.schema.dropped.is_empty() {
            ids.extend([XID_FIELD_ID, RECEIVED_AT_FIELD_ID]);
        }
        if wants_extra {
            let pending = self.schema.fields.iter().filter(|f| !f.column_ready);
            ids.extend(pending.map(|f| f.id));
        }
        ids
    }

    fn expression(
        &self,
        target: &Field,
        file: &FileColumns<'_>,
        stored: Stored,
    ) -> Result<Physical, EngineError> {
        if target.id == EXTRA_FIELD_ID {
            return self.extra(target, file, stored);
        }
        if let Some(column) = file.column(target)? {
            return Ok(column);
        }
        if stored.has_extra
            && target.id >= FIRST_USER_FIELD_ID
            && let Some(extra) = self.extra_column(file)?
        {
            let kind = ExtraKind::Promote(target.clone());
            return Ok(Arc::new(ExtraExpr {
                kind,
                children: vec![extra],
            }));
        }
        null(target)
    }

    /// The file's `_extra` without what fields had there that have been dropped since.
    fn extra_column(&self, file: &FileColumns<'_>) -> Result<Option<Physical>, EngineError> {
        let column = |name| match self.schema.field(name) {
            Some(field) => file.column(field),
            None => Ok(None),
        };
        let Some(extra) = column(EXTRA)? else {
            return Ok(None);
        };
        if self.schema.dropped.is_empty() {
            return Ok(Some(extra));
        }
        let (Some(xid), Some(received_at)) = (file.column(&xid_field())?, column(RECEIVED_AT)?)
        else {
            return Err(EngineError::CorruptFile {
                reason: "it does not say where its events come from".to_owned(),
            });
        };
        let kind = ExtraKind::Strip(self.schema.dropped.clone());
        Ok(Some(Arc::new(ExtraExpr {
            kind,
            children: vec![extra, xid, received_at],
        })))
    }

    /// `_extra` of the table: the file's, without the fields that are columns now and with those that are not yet.
    fn extra(
        &self,
        target: &Field,
        file: &FileColumns<'_>,
        stored: Stored,
    ) -> Result<Physical, EngineError> {
        let column = if stored.has_extra {
            self.extra_column(file)?
        } else {
            file.column(target)?
        };
        let mut children = vec![match column {
            Some(column) => column,
            None => null(target)?,
        }];
        let (mut drop, mut add) = (Vec::new(), Vec::new());
        for field in &self.schema.fields {
            if field.id < FIRST_USER_FIELD_ID {
                continue;
            }
            let column = file.column(field)?;
            if field.column_ready {
                let newer = match stored.version {
                    Some(version) => field.added_version > version,
                    None => column.is_none(),
                };
                if newer && stored.has_extra {
                    drop.push(field.clone());
                }
            } else if let Some(column) = column {
                add.push(field.clone());
                children.push(column);
            }
        }
        if drop.is_empty() && add.is_empty() {
            return Ok(children.remove(0));
        }
        let kind = ExtraKind::Merge { drop, add };
        Ok(Arc::new(ExtraExpr { kind, children }))
    }
}

/// What the catalogue says of a file or chunk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stored {
    /// Some row's `_extra` is not NULL.
    pub(crate) has_extra: bool,
    /// The schema version it was written under. `None`: its Arrow schema is complete, so a field that it lacks is
    /// newer; of a chunk only the needed columns are decoded.
    pub(crate) version: Option<i32>,
}

fn null(field: &Field) -> Result<Physical, EngineError> {
    let value = ScalarValue::try_from(field.arrow().data_type())?;
    Ok(Arc::new(Literal::new(value)))
}

/// A file's columns by field id.
struct FileColumns<'a> {
    schema: &'a ArrowSchema,
    by_id: HashMap<i32, usize>,
}

impl<'a> FileColumns<'a> {
    fn new(schema: &'a ArrowSchema) -> Self {
        let by_id = schema
            .fields()
            .iter()
            .enumerate()
            .filter_map(|(index, field)| {
                let id = field.metadata().get(FIELD_ID_KEY)?;
                Some((id.parse().ok()?, index))
            })
            .collect();
        Self { schema, by_id }
    }

    /// The column with the target's id, in the target's exact Arrow type.
    fn column(&self, target: &Field) -> Result<Option<Physical>, EngineError> {
        let Some(&index) = self.by_id.get(&target.id) else {
            return Ok(None);
        };
        let field = self.schema.field(index);
        let column: Physical = Arc::new(Column::new(field.name(), index));
        let wanted = target.arrow();
        if field.data_type() == wanted.data_type() {
            return Ok(Some(column));
        }
        if !same_values(field.data_type(), wanted.data_type()) {
            return Err(EngineError::CorruptFile {
                reason: format!(
                    "field {} has type {} where the catalogue says {}",
                    target.id,
                    field.data_type(),
                    target.ty
                ),
            });
        }
        let cast = CastExpr::new(column, wanted.data_type().clone(), None);
        Ok(Some(Arc::new(cast)))
    }
}

/// Whether two Arrow types are two ways to hold the same values.
fn same_values(a: &DataType, b: &DataType) -> bool {
    use DataType as D;
    match (a, b) {
        (D::Utf8 | D::LargeUtf8 | D::Utf8View, D::Utf8) => true,
        (D::Binary | D::BinaryView | D::FixedSizeBinary(16), D::FixedSizeBinary(16)) => true,
        (D::Timestamp(from, Some(_)), D::Timestamp(to, Some(_))) => from == to,
        (D::List(from), D::List(to)) => same_values(from.data_type(), to.data_type()),
        _ => a.equals_datatype(b),
    }
}

/// Evaluates the expressions of [`Table::expressions`] on a batch.
pub(crate) fn adapt(
    table: &Table,
    expressions: &[Physical],
    batch: &RecordBatch,
) -> DfResult<RecordBatch> {
    let columns = expressions
        .iter()
        .map(|e| e.evaluate(batch)?.into_array(batch.num_rows()))
        .collect::<DfResult<Vec<_>>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    let schema = Arc::clone(&table.target_schema);
    Ok(RecordBatch::try_new_with_options(
        schema, columns, &options,
    )?)
}

/// Rewrites what DataFusion evaluates over the target schema into what can be evaluated over one Parquet file.
#[derive(Debug)]
pub(crate) struct FileAdapterFactory {
    pub(crate) table: Arc<Table>,
    pub(crate) has_extra: bool,
    /// The scan's filter, to be known again among the expressions to rewrite.
    pub(crate) filter: Option<Physical>,
}

impl PhysicalExprAdapterFactory for FileAdapterFactory {
    fn create(
        &self,
        _logical: SchemaRef,
        physical: SchemaRef,
    ) -> DfResult<Arc<dyn PhysicalExprAdapter>> {
        let stored = Stored {
            has_extra: self.has_extra,
            version: None,
        };
        let expressions = self.table.expressions(&physical, stored)?;
        let by_name = self
            .table
            .targets
            .iter()
            .map(|target| target_name(target.id))
            .zip(expressions)
            .collect();
        Ok(Arc::new(FileAdapter {
            by_name,
            filter: self.filter.clone(),
            file: physical,
        }))
    }
}

#[derive(Debug)]
struct FileAdapter {
    by_name: HashMap<String, Physical>,
    filter: Option<Physical>,
    file: SchemaRef,
}

impl PhysicalExprAdapter for FileAdapter {
    fn rewrite(&self, expr: Physical) -> DfResult<Physical> {
        let is_filter = self.filter.as_ref().is_some_and(|f| Arc::ptr_eq(f, &expr));
        let expr = self.replace_columns(expr)?;
        // A filter on a field that the file lacks is NULL for each row. DataFusion skips a file by FALSE only.
        Ok(match is_filter.then(|| Filter::fold(&expr, &self.file)) {
            Some(filter) => match filter? {
                Filter::Nothing => Arc::new(Literal::new(ScalarValue::Boolean(Some(false)))),
                Filter::All | Filter::Some(_) => expr,
            },
            None => expr,
        })
    }
}

impl FileAdapter {
    fn replace_columns(&self, expr: Physical) -> DfResult<Physical> {
        expr.transform_up(|node| {
            let Some(column) = node.downcast_ref::<Column>() else {
                return Ok(Transformed::no(node));
            };
            match self.by_name.get(column.name()) {
                Some(expr) => Ok(Transformed::yes(Arc::clone(expr))),
                None => Err(EngineError::Internal(format!(
                    "the scan has no column {}",
                    column.name()
                ))
                .into()),
            }
        })
        .data()
    }
}

/// What [`ExtraExpr`] does with its children.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum ExtraKind {
    /// Child: `_extra`. The field's value there, as far as it fits.
    Promote(Field),
    /// Children: `_extra`, `_xid`, `_received_at`. `_extra` without what older rows have of dropped fields.
    Strip(Vec<DroppedField>),
    /// Children: `_extra`, then one column for each of `add`.
    Merge { drop: Vec<Field>, add: Vec<Field> },
}

/// The functions of [`rakam_event::extra`] as one expression.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct ExtraExpr {
    pub(crate) kind: ExtraKind,
    pub(crate) children: Vec<Physical>,
}

impl fmt::Display for ExtraExpr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            ExtraKind::Promote(field) => write!(f, "promote(#{})", field.id),
            ExtraKind::Strip(fields) => write!(f, "strip_extra(-{})", fields.len()),
            ExtraKind::Merge { drop, add } => {
                write!(f, "merge_extra(-{}, +{})", drop.len(), add.len())
            }
        }
    }
}

impl PhysicalExpr for ExtraExpr {
    fn data_type(&self, _input: &ArrowSchema) -> DfResult<DataType> {
        Ok(match &self.kind {
            ExtraKind::Promote(field) => field.arrow().data_type().clone(),
            ExtraKind::Strip(_) | ExtraKind::Merge { .. } => DataType::Utf8,
        })
    }

    fn nullable(&self, _input: &ArrowSchema) -> DfResult<bool> {
        Ok(true)
    }

    fn evaluate(&self, batch: &RecordBatch) -> DfResult<ColumnarValue> {
        let mut columns = self
            .children
            .iter()
            .map(|child| child.evaluate(batch)?.into_array(batch.num_rows()))
            .collect::<DfResult<Vec<_>>>()?
            .into_iter();
        let stored = columns.next();
        let stored = text(stored.as_ref())?;
        let array = match &self.kind {
            ExtraKind::Promote(field) => {
                extra::promote(stored, &[field]).map(|mut promoted| promoted.pop())
            }
            ExtraKind::Strip(dropped) => {
                let (xid, received_at) = (columns.next(), columns.next());
                let unexpected =
                    || EngineError::Internal("the origin of events is of another type".to_owned());
                let xid = xid
                    .as_ref()
                    .and_then(|c| c.as_primitive_opt::<Int64Type>())
                    .ok_or_else(unexpected)?;
                let received_at = received_at
                    .as_ref()
                    .and_then(|c| c.as_primitive_opt::<TimestampMicrosecondType>())
                    .ok_or_else(unexpected)?;
                extra::strip(stored, xid, received_at, dropped)
                    .map(|stripped| Some(Arc::new(stripped) as _))
            }
            ExtraKind::Merge { drop, add } => {
                let drop: Vec<&Field> = drop.iter().collect();
                let add: Vec<(&Field, ArrayRef)> = add.iter().zip(columns).collect();
                extra::merge_extra(stored, &drop, &add).map(|merged| Some(Arc::new(merged) as _))
            }
        };
        let array = array
            .map_err(|e| EngineError::CorruptFile {
                reason: e.to_string(),
            })?
            .ok_or_else(|| EngineError::Internal("nothing was promoted".to_owned()))?;
        Ok(ColumnarValue::Array(array))
    }

    fn children(&self) -> Vec<&Physical> {
        self.children.iter().collect()
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Physical>) -> DfResult<Physical> {
        let kind = self.kind.clone();
        Ok(Arc::new(Self { kind, children }))
    }

    fn fmt_sql(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn text(column: Option<&ArrayRef>) -> DfResult<&arrow::array::StringArray> {
    column
        .and_then(|column| column.as_string_opt::<i32>())
        .ok_or_else(|| EngineError::Internal("_extra is not text".to_owned()).into())
}
