//! What surrounds a load-balancing policy: `common_lb_config`, slow start, localities, subsets.

use super::{Decoder, Valid, endpoint::metadata_values};
use crate::resource::{
    HealthStatus, HealthStatuses, LbSettings, LocalityLb, SlowStart, SubsetConfig, SubsetFallback, SubsetSelector,
};
use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::{
                Cluster as Proto,
                cluster::{
                    CommonLbConfig, LbSubsetConfig, SlowStartConfig as LegacySlowStart,
                    common_lb_config::LocalityConfigSpecifier as LegacyLocality,
                    lb_subset_config::{LbSubsetFallbackPolicy, lb_subset_selector::LbSubsetSelectorFallbackPolicy},
                },
            },
            core::v3::RuntimeDouble,
        },
        extensions::load_balancing_policies::{
            common::v3::{LocalityLbConfig, SlowStartConfig, locality_lb_config::LocalityConfigSpecifier},
            subset::v3::Subset,
        },
        r#type::v3::Percent,
    },
    google::protobuf::{Duration as ProtoDuration, Struct},
};
use std::sync::Arc;

impl Decoder<'_> {
    /// From the cluster's own fields; the policy adds to it.
    pub(super) fn lb_settings(&mut self, proto: &mut Proto) -> Valid<LbSettings> {
        let mut settings = LbSettings::default();
        if let Some(common) = &proto.common_lb_config {
            self.at("common_lb_config", |cx| cx.common_lb(common, &mut settings))?;
        }
        // As in Envoy, `load_balancing_policy` replaces it; a subset policy sets it again.
        if let Some(config) = proto.lb_subset_config.take()
            && proto.load_balancing_policy.is_none()
            && !config.subset_selectors.is_empty()
        {
            settings.subsets = Some(Arc::new(self.at("lb_subset_config", |cx| cx.lb_subsets(config))?));
        }
        Ok(settings)
    }

    fn common_lb(&mut self, common: &CommonLbConfig, settings: &mut LbSettings) -> Valid<()> {
        self.ignored(&[
            ("close_connections_on_host_set_change", common.close_connections_on_host_set_change),
            ("ignore_new_hosts_until_first_hc", common.ignore_new_hosts_until_first_hc),
            // Zero asks for what we do: changes are taken as they come.
            (
                "update_merge_window",
                common.update_merge_window.is_some_and(|window| window != ProtoDuration::default()),
            ),
        ]);
        settings.panic_threshold =
            self.share("healthy_panic_threshold", common.healthy_panic_threshold.as_ref(), 50.0)?;
        if let Some(LegacyLocality::ZoneAwareLbConfig(zone)) = &common.locality_config_specifier {
            settings.localities = LocalityLb::ZoneAware {
                enabled: self.share("zone_aware_lb_config.routing_enabled", zone.routing_enabled.as_ref(), 100.0)?,
                min_cluster_size: zone.min_cluster_size.map_or(6, |size| size.value),
            };
            settings.fail_on_panic = zone.fail_traffic_on_panic;
        }
        if let Some(set) = &common.override_host_status {
            settings.override_host_statuses =
                set.statuses.iter().fold(HealthStatuses::NONE, |set, status| match status {
                    // gRFC A55: the others are ignored.
                    0 => set.and(HealthStatus::Unknown),
                    1 => set.and(HealthStatus::Healthy),
                    3 => set.and(HealthStatus::Draining),
                    _ => set,
                });
        }
        Ok(())
    }

    pub(super) fn locality_lb(&mut self, config: Option<&LocalityLbConfig>, settings: &mut LbSettings) -> Valid<()> {
        let specifier = config.and_then(|config| config.locality_config_specifier.as_ref());
        if let Some(LocalityConfigSpecifier::ZoneAwareLbConfig(zone)) = specifier {
            self.ignored(&[
                ("zone_aware_lb_config.force_locality_direct_routing", zone.force_locality_direct_routing),
                ("zone_aware_lb_config.force_local_zone", zone.force_local_zone.is_some()),
                ("zone_aware_lb_config.locality_basis", zone.locality_basis != 0),
            ]);
            settings.localities = LocalityLb::ZoneAware {
                enabled: self.share("zone_aware_lb_config.routing_enabled", zone.routing_enabled.as_ref(), 100.0)?,
                min_cluster_size: zone.min_cluster_size.map_or(6, |size| size.value),
            };
            settings.fail_on_panic = zone.fail_traffic_on_panic;
        }
        Ok(())
    }

    pub(super) fn slow_start(&mut self, config: Option<&SlowStartConfig>) -> Valid<Option<SlowStart>> {
        let Some(config) = config else { return Ok(None) };
        let fields = (config.slow_start_window, config.aggression.as_ref(), config.min_weight_percent);
        self.at("slow_start_config", |cx| cx.slow_start_fields(fields))
    }

    pub(super) fn legacy_slow_start(&mut self, config: Option<&LegacySlowStart>) -> Valid<Option<SlowStart>> {
        let Some(config) = config else { return Ok(None) };
        let fields = (config.slow_start_window, config.aggression.as_ref(), config.min_weight_percent);
        self.at("slow_start_config", |cx| cx.slow_start_fields(fields))
    }

    fn slow_start_fields(
        &mut self,
        (window, aggression, min_weight): (Option<ProtoDuration>, Option<&RuntimeDouble>, Option<Percent>),
    ) -> Valid<Option<SlowStart>> {
        let window = self.duration("slow_start_window", window)?.filter(|window| !window.is_zero());
        let aggression = aggression.map_or(1.0, |value| value.default_value);
        if aggression.is_nan() || aggression <= 0.0 {
            return Err(self.invalid_at("aggression", format!("{aggression} is not greater than zero")));
        }
        let min_weight = self.share("min_weight_percent", min_weight.as_ref(), 10.0)?;
        Ok(window.map(|window| SlowStart { window, aggression, min_weight }))
    }

    fn lb_subsets(&mut self, proto: LbSubsetConfig) -> Valid<SubsetConfig> {
        self.ignored(&[
            ("locality_weight_aware", proto.locality_weight_aware),
            ("list_as_any", proto.list_as_any),
            ("metadata_fallback_policy", proto.metadata_fallback_policy != 0),
        ]);
        let fallback = match proto.fallback_policy() {
            LbSubsetFallbackPolicy::NoFallback => SubsetFallback::None,
            LbSubsetFallbackPolicy::AnyEndpoint => SubsetFallback::Any,
            LbSubsetFallbackPolicy::DefaultSubset => SubsetFallback::Default,
        };
        let mut selectors = Vec::with_capacity(proto.subset_selectors.len());
        for (index, selector) in proto.subset_selectors.into_iter().enumerate() {
            let fallback = selector.fallback_policy;
            let fields = (selector.keys, selector.fallback_keys_subset, selector.single_host_per_subset);
            selectors.push(self.at_index("subset_selectors", index, |cx| cx.subset_selector(fields, fallback))?);
        }
        let panic_mode_any = proto.panic_mode_any;
        Ok(self.subset_config(fallback, proto.default_subset, selectors, panic_mode_any))
    }

    /// `envoy.extensions.load_balancing_policies.subset.v3.Subset`: the same fields in another message.
    pub(super) fn subset_policy(&mut self, proto: Subset) -> Valid<SubsetConfig> {
        self.ignored(&[
            ("locality_weight_aware", proto.locality_weight_aware),
            ("list_as_any", proto.list_as_any),
            ("metadata_fallback_policy", proto.metadata_fallback_policy != 0),
        ]);
        let fallback = match proto.fallback_policy {
            1 => SubsetFallback::Any,
            2 => SubsetFallback::Default,
            _ => SubsetFallback::None,
        };
        let mut selectors = Vec::with_capacity(proto.subset_selectors.len());
        for (index, selector) in proto.subset_selectors.into_iter().enumerate() {
            let fallback = selector.fallback_policy;
            let fields = (selector.keys, selector.fallback_keys_subset, selector.single_host_per_subset);
            selectors.push(self.at_index("subset_selectors", index, |cx| cx.subset_selector(fields, fallback))?);
        }
        Ok(self.subset_config(fallback, proto.default_subset, selectors, proto.panic_mode_any))
    }

    fn subset_config(
        &mut self,
        fallback: SubsetFallback,
        default_subset: Option<Struct>,
        selectors: Vec<SubsetSelector>,
        panic_mode_any: bool,
    ) -> SubsetConfig {
        let default_subset = default_subset.map(|fields| metadata_values(fields.fields)).unwrap_or_default();
        SubsetConfig { fallback, default_subset, selectors, panic_mode_any }
    }

    fn subset_selector(
        &mut self,
        (mut keys, mut fallback_keys, single_host): (Vec<String>, Vec<String>, bool),
        fallback: i32,
    ) -> Valid<SubsetSelector> {
        keys.sort();
        keys.dedup();
        fallback_keys.sort();
        fallback_keys.dedup();
        if keys.is_empty() {
            return Err(self.invalid_at("keys", "must not be empty"));
        }
        let fallback = match LbSubsetSelectorFallbackPolicy::try_from(fallback) {
            Ok(LbSubsetSelectorFallbackPolicy::NoFallback) => Some(SubsetFallback::None),
            Ok(LbSubsetSelectorFallbackPolicy::AnyEndpoint) => Some(SubsetFallback::Any),
            Ok(LbSubsetSelectorFallbackPolicy::DefaultSubset) => Some(SubsetFallback::Default),
            Ok(LbSubsetSelectorFallbackPolicy::KeysSubset) => {
                let part = !fallback_keys.is_empty() && fallback_keys.iter().all(|key| keys.contains(key));
                if !part || fallback_keys.len() >= keys.len() {
                    return Err(self.invalid_at("fallback_keys_subset", "must be a part of keys, and not all of them"));
                }
                Some(SubsetFallback::Keys(fallback_keys))
            }
            Ok(LbSubsetSelectorFallbackPolicy::NotDefined) | Err(_) => None,
        };
        Ok(SubsetSelector { keys, single_host, fallback })
    }
}
