//! The DSDT: devices that cannot be discovered, and the sleep state S5.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::legacy::power::SLEEP_TYPE_S5;
use crate::memory::layout;

/// The DSDT of a VM with `vcpus` vCPUs.
pub(super) fn dsdt(vcpus: u8) -> Sdt {
    let mut aml = Vec::new();
    processors(&mut aml, vcpus);
    host_bridge(&mut aml);
    motherboard(&mut aml);
    serial_and_clock(&mut aml);
    let s5 = Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &ZERO, &ZERO]);
    Name::new(Path::new("_S5_"), &s5).to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

fn processors(aml: &mut Vec<u8>, vcpus: u8) {
    for vcpu in 0..vcpus {
        let hid = Name::new(Path::new("_HID"), &"ACPI0007");
        let uid = Name::new(Path::new("_UID"), &vcpu);
        let device = Device::new(Path::new(&format!("CP{vcpu:02X}")), vec![&hid, &uid]);
        Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(aml);
    }
}

/// The PCI host bridge: one bus, configuration by ports and by memory, message-signalled
/// interrupts only.
fn host_bridge(aml: &mut Vec<u8>) {
    let window_end = layout::PCI_MMIO_START + layout::PCI_MMIO_SIZE - 1;
    let low32 = |address: u64| u32::try_from(address).unwrap_or(0);
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let ports_below = AddressSpace::new_io(0u16, 0x0cf7, None);
    let ports_above = AddressSpace::new_io(0x0d00u16, 0xffff, None);
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        low32(layout::PCI_MMIO_START),
        low32(window_end),
        None,
    );
    let resources =
        ResourceTemplate::new(vec![&bus, &config_ports, &ports_below, &ports_above, &memory]);
    let (express, classic) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
    let names = [
        Name::new(Path::new("_HID"), &express),
        Name::new(Path::new("_CID"), &classic),
        Name::new(Path::new("_SEG"), &ZERO),
        Name::new(Path::new("_BBN"), &ZERO),
        Name::new(Path::new("_UID"), &ZERO),
        Name::new(Path::new("_CRS"), &resources),
    ];
    let children: Vec<&dyn Aml> = names.iter().map(|name| name as &dyn Aml).collect();
    let device = Device::new(Path::new("PCI0"), children);
    Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(aml);
}

/// What is taken: the configuration space by memory, and the power management ports.
fn motherboard(aml: &mut Vec<u8>) {
    let low32 = |value: u64| u32::try_from(value).unwrap_or(0);
    let ecam =
        Memory32Fixed::new(true, low32(layout::PCI_ECAM_START), low32(layout::PCI_ECAM_SIZE));
    let ports = u8::try_from(layout::PM_PORTS).unwrap_or(u8::MAX);
    let power = IO::new(layout::PM_PORT, layout::PM_PORT, 1, ports);
    let resources = ResourceTemplate::new(vec![&ecam, &power]);
    let hid = EISAName::new("PNP0C02");
    let names = [Name::new(Path::new("_HID"), &hid), Name::new(Path::new("_CRS"), &resources)];
    let device = Device::new(Path::new("MBRD"), vec![&names[0], &names[1]]);
    Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(aml);
}

fn serial_and_clock(aml: &mut Vec<u8>) {
    let irq = Interrupt::new(true, true, false, false, layout::SERIAL_GSI);
    let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8);
    let resources = ResourceTemplate::new(vec![&ports, &irq]);
    let hid = EISAName::new("PNP0501");
    let names = [
        Name::new(Path::new("_HID"), &hid),
        Name::new(Path::new("_UID"), &ZERO),
        Name::new(Path::new("_CRS"), &resources),
    ];
    let serial = Device::new(Path::new("COM1"), vec![&names[0], &names[1], &names[2]]);

    let ports = IO::new(crate::legacy::rtc::PORT, crate::legacy::rtc::PORT, 1, 2);
    let resources = ResourceTemplate::new(vec![&ports]);
    let hid = EISAName::new("PNP0B00");
    let names = [Name::new(Path::new("_HID"), &hid), Name::new(Path::new("_CRS"), &resources)];
    let clock = Device::new(Path::new("RTC0"), vec![&names[0], &names[1]]);
    Scope::new(Path::new("_SB_"), vec![&serial, &clock]).to_aml_bytes(aml);
}
