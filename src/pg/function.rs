//! Functions of the database by their oid: what they are, and calling one on jsonb.

use std::ffi::CStr;

use pgrx::datum::{FromDatum, IntoDatum};
use pgrx::{PgMemoryContexts, pg_sys};

use super::error::{PgError, Result};
use super::jsonb::{self, JsonbText};

/// What the catalog says of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    pub owner: pg_sys::Oid,
    pub arguments: Vec<pg_sys::Oid>,
    pub result: pg_sys::Oid,
    /// Neither an aggregate, a window function, a procedure nor one that returns a set.
    pub is_plain: bool,
}

/// A function's signature; None: there is no such function (any more).
pub fn signature(function: pg_sys::Oid) -> Option<Signature> {
    // SAFETY: syscache look-up by oid; everything is copied before the tuple is released; `proargtypes` has
    // `pronargs` entries.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::PROCOID as i32,
            pg_sys::Datum::from(function),
        );
        if tuple.is_null() {
            return None;
        }
        let form = pg_sys::GETSTRUCT(tuple) as pg_sys::Form_pg_proc;
        let signature = Signature {
            owner: (*form).proowner,
            arguments: (*form)
                .proargtypes
                .values
                .as_slice((*form).pronargs as usize)
                .to_vec(),
            result: (*form).prorettype,
            is_plain: (*form).prokind as u8 == pg_sys::PROKIND_FUNCTION && !(*form).proretset,
        };
        pg_sys::ReleaseSysCache(tuple);
        Some(signature)
    }
}

/// `schema.name(argument types)` of a function; its number if there is none (any more).
pub fn name(function: pg_sys::Oid) -> String {
    let text = |pointer: *mut std::ffi::c_char| {
        // SAFETY: NULL, or a NUL-terminated copy.
        (!pointer.is_null()).then(|| unsafe { CStr::from_ptr(pointer).to_string_lossy() })
    };
    let names = signature(function).and_then(|signature| {
        // SAFETY: look-ups by oid that give NULL, or a text for any type.
        unsafe {
            let schema = text(pg_sys::get_namespace_name(pg_sys::get_func_namespace(
                function,
            )))?;
            let name = text(pg_sys::get_func_name(function))?;
            let arguments: Vec<_> = signature
                .arguments
                .iter()
                .filter_map(|ty| text(pg_sys::format_type_be(*ty)))
                .collect();
            Some(format!("{schema}.{name}({})", arguments.join(", ")))
        }
    });
    names.unwrap_or_else(|| function.to_u32().to_string())
}

/// Whether a user may execute a function.
pub fn may_execute(function: pg_sys::Oid, user: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-ups by oid.
    unsafe {
        #[cfg(feature = "pg15")]
        let answer = pg_sys::pg_proc_aclcheck(function, user, pg_sys::ACL_EXECUTE);
        #[cfg(not(feature = "pg15"))]
        let answer = pg_sys::object_aclcheck(
            pg_sys::ProcedureRelationId,
            function,
            user,
            pg_sys::ACL_EXECUTE.into(),
        );
        answer == pg_sys::AclResult::ACLCHECK_OK
    }
}

pub const JSONB: pg_sys::Oid = pg_sys::JSONBOID;
pub const JSONB_ARRAY: pg_sys::Oid = pg_sys::JSONBARRAYOID;

/// Calls of one function that takes and returns jsonb, or arrays of jsonb. The caller has checked the signature,
/// and the right.
pub struct Calls {
    /// Holds what the function keeps between calls.
    _kept: PgMemoryContexts,
    /// Emptied after each call.
    scratch: PgMemoryContexts,
    info: *mut pg_sys::FmgrInfo,
}

impl Calls {
    pub fn new(function: pg_sys::Oid) -> Self {
        let mut kept = PgMemoryContexts::new("rakam function");
        let scratch = PgMemoryContexts::new("rakam function call");
        // SAFETY: the look-up data live in `kept` with what the function adds to them.
        let info = unsafe {
            kept.switch_to(|context| {
                let info: *mut pg_sys::FmgrInfo =
                    pg_sys::palloc0(std::mem::size_of::<pg_sys::FmgrInfo>()).cast();
                pg_sys::fmgr_info_cxt(function, info, context.value());
                info
            })
        };
        Self {
            _kept: kept,
            scratch,
            info,
        }
    }

    /// The result for one value; None for NULL.
    pub fn on_value(&mut self, text: &str) -> Result<Option<String>> {
        let info = self.info;
        // SAFETY: argument and result live in the scratch context, emptied after the text is copied out.
        unsafe {
            let result = self.scratch.switch_to(|_| {
                let argument = JsonbText(text.to_owned())
                    .into_datum()
                    .ok_or_else(nul_byte)?;
                Ok::<_, PgError>(
                    invoke(info, argument)
                        .and_then(|datum| JsonbText::from_datum(datum, false))
                        .map(|text| text.0),
                )
            });
            self.scratch.reset();
            result
        }
    }

    /// The elements of the result for an array of values, each None for NULL; no element for a NULL result.
    /// An error once they are more bytes than `max_bytes`.
    pub fn on_array(&mut self, texts: &[&str], max_bytes: usize) -> Result<Vec<Option<String>>> {
        let info = self.info;
        // SAFETY: as above; the result is an array of jsonb, as the signature says.
        unsafe {
            let result = self.scratch.switch_to(|_| {
                let argument =
                    jsonb::array(texts.iter().map(|text| Some(*text))).ok_or_else(nul_byte)?;
                invoke(info, argument).map_or(Ok(Vec::new()), |datum| {
                    jsonb::array_texts(datum, max_bytes).ok_or_else(|| {
                        PgError::new(
                            "54000",
                            format!("result of a batch is larger than {max_bytes} bytes"),
                        )
                    })
                })
            });
            self.scratch.reset();
            result
        }
    }
}

fn nul_byte() -> PgError {
    PgError::new("22P05", "NUL byte in JSON")
}

/// # Safety
/// `info` is set up for a function of one argument of the datum's type.
unsafe fn invoke(info: *mut pg_sys::FmgrInfo, argument: pg_sys::Datum) -> Option<pg_sys::Datum> {
    // SAFETY: the call's data have room for one argument; errors of the function are caught at the boundary and
    // unwind from here.
    unsafe {
        let bytes = std::mem::size_of::<pg_sys::FunctionCallInfoBaseData>()
            + std::mem::size_of::<pg_sys::NullableDatum>();
        let call: *mut pg_sys::FunctionCallInfoBaseData = pg_sys::palloc0(bytes).cast();
        let data = &mut *call;
        data.flinfo = info;
        data.nargs = 1;
        data.args.as_mut_slice(1)[0].value = argument;
        let address = (*info)
            .fn_addr
            .ok_or_else(|| PgError::internal("function without an address"));
        let address = super::error::OrRaise::or_raise(address);
        let result = pg_sys::ffi::pg_guard_ffi_boundary(|| address(call));
        (!(*call).isnull).then_some(result)
    }
}
