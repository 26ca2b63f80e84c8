//! Filters of the application.

use super::Filter;
use crate::{BoxError, error::caught};
use mesh_xds::resource::{CustomFilter, FilterParser, FilterPayload, HttpFilter, HttpFilterConfig};
use std::{any::Any, sync::Arc};

/// Makes filters from their configurations: see [`MeshBuilder::filter`](crate::MeshBuilder::filter).
pub trait FilterFactory: Send + Sync + 'static {
    /// Makes the filter of a configuration. Called when a resource comes; a configuration that stays the same keeps its filter.
    ///
    /// # Errors
    /// Why the configuration is refused: the resource is rejected (NACK), with the path of the field.
    fn create(&self, config: &FilterPayload) -> Result<Arc<dyn Filter>, BoxError>;

    /// The same for the configuration of a route, which replaces that of the filter (`typed_per_filter_config`).
    ///
    /// # Errors
    /// As of [`create`](Self::create).
    fn create_for_route(&self, config: &FilterPayload) -> Result<Arc<dyn Filter>, BoxError> {
        self.create(config)
    }
}

/// A filter for [`Policy::filters`](mesh_xds::source::Policy::filters): of targets that have no control plane.
pub fn filter(name: impl Into<Arc<str>>, filter: Arc<dyn Filter>) -> HttpFilter {
    let name = name.into();
    let payload = FilterPayload::Message(Vec::new());
    let custom = CustomFilter { type_name: name.clone(), payload, made: Arc::new(Made(filter)) };
    HttpFilter { name, config: HttpFilterConfig::Custom(custom), disabled: false }
}

/// What goes through the configuration path.
struct Made(Arc<dyn Filter>);

/// A factory, as the configuration path wants it.
pub(crate) struct Parser<F>(pub(crate) F);

impl<F: FilterFactory> FilterParser for Parser<F> {
    fn parse(&self, payload: &FilterPayload, of_route: bool) -> Result<Arc<dyn Any + Send + Sync>, String> {
        let make = || if of_route { self.0.create_for_route(payload) } else { self.0.create(payload) };
        match caught(make).unwrap_or_else(|panic| Err(format!("its factory panicked: {panic}").into())) {
            Ok(filter) => Ok(Arc::new(Made(filter))),
            Err(error) => Err(crate::error::chain(&*error)),
        }
    }
}

/// The filter in a configuration, if it was made here.
pub(super) fn made(custom: &CustomFilter) -> Option<Arc<dyn Filter>> {
    custom.made.downcast_ref::<Made>().map(|made| made.0.clone())
}
